"""`python -m benchmarks all`: its commands are sound, and nothing is measured twice."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import everything as module
from benchmarks.__main__ import BENCHMARKS
from config import EvalConfig, parse
from tests.conftest import ROOT
from utils.provenance import SOURCE, source_hash
from validation import check_flags


@pytest.mark.parametrize("name", module.measurements())
def test_each_command_is_one_that_can_be_given(name):
    minutes, line = module.measurements()[name]
    script, *flags = shlex.split(line)
    if script == "validation.py":
        cfg = parse(EvalConfig, "", flags)
        check_flags(cfg)
        assert (ROOT / cfg.path_to_model).is_file()
    else:
        assert (script, flags[0]) == ("-m", "benchmarks")
        parse(BENCHMARKS[flags[1]][0], "", flags[2:])
    assert minutes > 0


def test_what_is_measured_is_kept(cli, refuses, monkeypatch):
    """Here of two, by a stand-in for the commands, of which the second fails at first."""
    run, fails = [], {"floors"}

    def command(arguments, **_):
        run.append(arguments)
        name = "unet" if "validation.py" in arguments else arguments[3]
        path = Path(f"outputs/benchmark/{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {"source": source_hash(SOURCE), "command": shlex.join(["python", *arguments[1:]])}
        if name not in fails:
            path.write_text(json.dumps({"provenance": made} if name == "unet" else made))
        return SimpleNamespace(returncode=int(name in fails))

    monkeypatch.setattr(module.subprocess, "run", command)
    flags = ["benchmarks", "all", "--only", "unet,floors", "--data_dir", "d", "--device", "cpu"]
    refuses(*flags, words=("floors: python -m benchmarks floors failed",))
    assert [arguments[0] for arguments in run] == [sys.executable] * 2
    assert run[0][-4:] == ["--data_dir", "d", "--device", "cpu"]
    assert str(Path("outputs/benchmark/unet.json")) in run[0]
    fails.clear()
    status, stdout, _ = cli(*flags)
    assert status == 0 and "1 of 2 to measure" in stdout and len(run) == 3
    assert cli(*flags)[0] == 0 and len(run) == 3
    Path("outputs/benchmark/unet.json").write_text('{"provenance": {"source": "of other code"}}')
    assert cli(*flags)[0] == 0 and len(run) == 4
    assert cli(*flags, "--device", "auto")[0] == 0 and len(run) == 6  # of another device
    refuses("benchmarks", "all", "--only", "unet,nets", words=("--only unet,nets", "resnet"))

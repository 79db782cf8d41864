"""Every result says what made it, and none is found again by other code."""

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import ROOMS, measurement_key
from config import EvalConfig
from scoring.evaluation import Candidate
from tests.conftest import DIGITS, ROOT
from utils import provenance
from utils.data_loader import Dataset
from utils.provenance import SOURCE, source_hash
from validation import write_scores

CPU = torch.device("cpu")


def git(*arguments):
    """What git says, of the folder's own repository even where a hook runs the tests."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, env=own)
    return done.stdout.decode()


@pytest.fixture
def repository(own_folder, monkeypatch):
    """A small one, taken for the project's own; returns its folder."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setattr(provenance, "ROOT", own_folder)
    for name in ("config.py", "README.md", "docs/page.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return own_folder


@pytest.fixture
def copied(own_folder, monkeypatch):
    """A copy of the project's source in place of its own; returns the folder."""
    folder = own_folder / "copy"
    folder.mkdir()
    for room in SOURCE:
        if (ROOT / room).is_file():
            shutil.copy(ROOT / room, folder)
        else:
            ignored = shutil.ignore_patterns("__pycache__", "*.pth", "*.pt")
            shutil.copytree(ROOT / room, folder / room, ignore=ignored)
    monkeypatch.setattr(provenance, "ROOT", folder)
    return folder


def test_the_commit_and_whether_files_differ_from_it(repository):
    said = provenance.commit()
    assert len(said) == 12 and git("rev-parse", "HEAD").startswith(said)
    for harmless in ("new.py", "README.md", "docs/page.md"):  # untracked, or a page
        Path(harmless).write_text("2\n")
        assert provenance.commit() == said
    Path("config.py").write_text("2\n")
    assert provenance.commit() == f"{said}+changes"


def test_where_there_is_no_commit_there_is_none_and_nothing_is_said(repository, monkeypatch, capfd):
    inner = repository / "inner"  # a copy of the code inside somebody's repository
    inner.mkdir()
    monkeypatch.setattr(provenance, "ROOT", inner)
    assert provenance.commit() is None
    monkeypatch.setattr(provenance, "ROOT", repository)
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance(CPU)["commit"] is None
    assert capfd.readouterr() == ("", "")


def test_another_repository_that_git_was_told_of_is_not_ours(repository, monkeypatch):
    said = provenance.commit()
    monkeypatch.setenv("GIT_DIR", str(repository / "elsewhere"))
    assert provenance.commit() == said


@pytest.mark.parametrize(
    "argv, words",
    [
        (["main.py", "--epochs", "2"], ["main.py", "--epochs", "2"]),
        (["generate.py", "--label", "a b"], ["generate.py", "--label", "a b"]),
        (
            [str(ROOT / "benchmarks/__main__.py"), "train", "--settings", "--lr 1 --width '8'"],
            ["-m", "benchmarks", "train", "--settings", "--lr 1 --width '8'"],
        ),
        ([str(ROOT / "utils/checkpoint.py"), "in"], ["-m", "utils.checkpoint", "in"]),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch, argv, words):
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(provenance.command()) == ["python", *words]


def test_what_made_a_result_is_plain_and_complete():
    made = provenance.provenance(CPU)
    assert json.loads(json.dumps(made)) == made
    assert set(made) == {"command", "commit", "source", "date", "hardware", "versions"}
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(
        made["date"]
    )
    assert abs(age.total_seconds()) < 60
    assert made["versions"]["torch"] == torch.__version__
    assert made["hardware"]["cores"] >= 1 and made["hardware"]["gpu"] is None
    assert made["hardware"]["threads"] == torch.get_num_threads()


def test_every_file_of_every_room_is_in_the_hash_of_the_source(copied):
    assert source_hash(SOURCE) == source_hash(SOURCE)
    for room in SOURCE:
        path = copied / room
        path = path if path.is_file() else sorted(path.rglob("*.py"))[-1]
        text, before = path.read_text(), source_hash(SOURCE)
        path.write_text(text.replace("a", "b", 1))
        assert source_hash(SOURCE) != before, path
        path.write_text(text)
        assert source_hash(SOURCE) == before
    path.rename(path.with_name("another.py"))
    assert source_hash(SOURCE) != before
    path.with_name("another.py").rename(path)
    (copied / "utils/notes.md").write_text("not code")
    assert source_hash(SOURCE) == before


def test_the_source_of_a_copy_is_the_same_whatever_ends_its_lines(copied, monkeypatch):
    of_copy = source_hash(SOURCE)
    (copied / "config.py").write_bytes((copied / "config.py").read_bytes().replace(b"\n", b"\r\n"))
    assert source_hash(SOURCE) == of_copy
    monkeypatch.setattr(provenance, "ROOT", ROOT)
    assert source_hash(SOURCE) == of_copy


def imports_of(path):
    """The modules of the project that a file imports, as paths; all of them, if it is a package."""
    found = re.findall(r"^\s*(?:from|import) ([\w.]+)", (ROOT / path).read_text(), re.M)
    names = [name.replace(".", "/") for name in found]
    return {f"{name}.py" for name in names if (ROOT / f"{name}.py").is_file()}


@pytest.mark.parametrize(
    "path, rooms",
    [
        ("benchmarks/sampling.py", (*ROOMS, "benchmarks/sampling.py")),
        ("benchmarks/training.py", (*ROOMS, "training", "benchmarks/training.py")),
    ],
)
def test_all_that_a_kept_measurement_runs_is_in_its_key(path, rooms):
    drawing = {"benchmarks/figures.py", "benchmarks/parts.py"}  # pictures, and a profile
    todo, seen = {path}, set()
    while todo:
        seen |= todo
        todo = set().union(*map(imports_of, todo)) - seen - drawing
    outside = {file for file in seen if file not in rooms and file.split("/")[0] not in rooms}
    assert not outside and len(seen) > 20


def test_a_measurement_has_another_key_by_whatever_decides_it(copied, monkeypatch):
    images, labels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([3, 4])
    data = Dataset(images, labels, DIGITS)
    keys = [
        measurement_key(CPU, ROOMS, [data], "seed 1"),
        measurement_key(CPU, ROOMS, [data], "seed 2"),
        measurement_key(CPU, ROOMS, [Dataset(images + 1, labels, DIGITS)], "seed 1"),
        measurement_key(CPU, ROOMS, [Dataset(images, labels + 1, DIGITS)], "seed 1"),
        measurement_key(CPU, (*ROOMS, "training"), [data], "seed 1"),
    ]
    for place, value in (("torch.__version__", "2.0.0"), ("torch.get_num_threads", lambda: 99)):
        with monkeypatch.context() as patch:
            patch.setattr(place, value)
            keys.append(measurement_key(CPU, ROOMS, [data], "seed 1"))
    assert measurement_key(CPU, ROOMS, [data], "seed 1") == keys[0]
    with open(copied / "scoring/metrics.py", "a") as file:
        file.write("\n")
    keys.append(measurement_key(CPU, ROOMS, [data], "seed 1"))
    assert len(set(keys)) == len(keys) == 8


def test_a_score_file_says_what_made_it_and_is_not_named_by_that(monkeypatch):
    scores = {"features": "mnist", "n": 40, "fid": 1.5}
    scores |= {"reference": "the test set", "reference_hash": "r", "feature_hash": "f"}
    candidate, paths = Candidate(None, None, "drawn", {"seed": 1}), set()
    for commit in ("a", "b"):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: commit)
        paths.add(write_scores(EvalConfig(device="cpu"), candidate, scores))
        found = json.loads(next(iter(paths)).read_text())
        assert found.pop("provenance")["commit"] == commit and found == scores
    assert len(paths) == 1 and "provenance" not in scores
    several = write_scores(EvalConfig(validate_all=True), candidate, [scores, scores])
    assert all("command" in each["provenance"] for each in json.loads(several.read_text()))

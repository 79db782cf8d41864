"""Whatever happens to stdout and stderr, a script does its work and ends without a traceback."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import WITH_PATH
from utils import script

# prints, writes its result, prints again: by print, by a progress bar and by a failed flag
SCRIPT = """
import sys
from pathlib import Path
from tqdm import tqdm
from config import UserError
from utils.script import run

def main():
    print("fid 1.66 ± 0.04", flush=True)
    for _ in tqdm(range(3), mininterval=0):
        print("é" * 100_000)
        print("warned", file=sys.stderr, flush=True)
    open("first", "w").close()
    if "bad" in sys.argv:
        raise UserError("--steps ±: must be an integer")
    with open("result", "w") as file:  # never where the prints go, even if those are closed
        file.write("done" if file.fileno() > 2 else "mixed")
    print("written: \\udcff")

run(main)
"""


def start(*arguments, shell="", **environment):
    """Run SCRIPT below a shell line in which $RUN stands for it; (status, stdout, stderr)."""
    Path("script.py").write_text(SCRIPT)
    words = " ".join([f"'{sys.executable}' script.py", *arguments])
    done = subprocess.run(
        ["bash", "-c", shell.replace("RUN", words) if shell else words],
        env={**WITH_PATH, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


BROKEN = {
    "stdout closed": "RUN >&-",
    "stderr closed": "RUN 2>&-",
    "all closed": "RUN <&- >&- 2>&-",
    "pipe without a reader": "set -o pipefail; RUN | true",
    "both to a pipe without a reader": "set -o pipefail; RUN 2>&1 | true",
    "a reader that leaves": "set -o pipefail; RUN 2>&1 | head -c 100",
    "disk full": "RUN >/dev/full",
    "disk full for both": "RUN >/dev/full 2>/dev/full",
    "stderr full": "RUN 2>/dev/full",
}


@pytest.mark.parametrize("mode", ["PYTHONUNBUFFERED", "PYTHONDEVMODE"])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_printed_costs_nothing(kind, mode):
    if "/dev/full" in BROKEN[kind] and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    status, _, stderr = start(shell=BROKEN[kind], **{mode: "1"})
    assert status == 0 and Path("result").read_text() == "done"
    assert "Traceback" not in stderr and "Exception ignored" not in stderr
    assert ("No space left" in stderr) == (kind == "disk full")
    assert stderr.count("stdout: ") <= 1


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_input_is_told_by_the_status_all_the_same(kind):
    assert start("bad", shell=BROKEN[kind])[0] == 2 and Path("first").exists()


def test_what_fails_when_it_is_flushed_is_told_once(capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = script._Output(Full())
    for _ in range(2):
        assert output.write("fid") == 3
        output.flush()
    assert capsys.readouterr().err.count("stdout: [Errno 28] No space left on device") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_can_print(encoding):
    status, stdout, stderr = start(PYTHONIOENCODING=encoding)
    assert status == 0 and Path("result").exists() and "Traceback" not in stderr
    sign = "\\xb1" if encoding == "ascii" else "±" if encoding == "utf-8" else "\ufffd"
    assert f"fid 1.66 {sign} 0.04" in stdout and "written: \\udcff" in stdout


def test_a_terminal_that_hangs_up():
    """The other end of a pseudo-terminal is closed while the script goes on printing."""
    pty = pytest.importorskip("pty")
    Path("script.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "script.py"], env=WITH_PATH, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert run.wait(timeout=100) == 0 and Path("result").exists()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_such"])
def test_a_notebooks_backend_is_not_asked_for(backend):
    code = "import utils.tensorboard_logger, utils.visualization"
    environment = {**WITH_PATH, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr

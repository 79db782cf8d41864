"""What guards a run: its folder against a second one, its work against whatever ends it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from config import UserError
from main import main
from tests.conftest import ROOT, TINY, WITH_PATH, same
from training import guard
from training.guard import StopSignals, locked
from utils.checkpoint import list_checkpoints
from utils.script import run

ENDS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
FLAGS = [*TINY, "--epochs", 7, "--keep", 99, "--device", "cpu"]
PARTS = ("network", "ema", "optimizers", "generator", "step")


@pytest.fixture(autouse=True)
def hang_up_is_heeded():
    """Even where these tests run under `nohup`, which ignores it."""
    number = getattr(signal, "SIGHUP", signal.SIGTERM)  # a test takes this name away
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


def answer(monkeypatch, number):
    """From now on flock fails with this error."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(guard.fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_what_means_held_is_held(monkeypatch, own_folder, number):
    Path(".lock").write_text("process 7 on elsewhere")
    answer(monkeypatch, number)
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), locked(own_folder):
        pass
    assert Path(".lock").exists()


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF, errno.EIO]
)
def test_a_file_system_without_locks(monkeypatch, own_folder, capsys, number):
    answer(monkeypatch, number)
    with locked(own_folder):
        Path("work").touch()
    assert os.listdir() == ["work"]
    assert capsys.readouterr().err.count("no file locks") == 1


def test_a_system_without_locks(monkeypatch, own_folder, capsys):
    monkeypatch.setattr(guard, "fcntl", None)
    with locked(own_folder):
        pass
    assert os.listdir() == [] and capsys.readouterr().err.count("no file locks") == 1


def test_a_lock_is_held_on_a_full_disk(monkeypatch, own_folder):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with locked(own_folder):
        with pytest.raises(UserError, match="in use by another process"), locked(own_folder):
            pass
    assert os.listdir() == []


@pytest.mark.parametrize("another", [False, True])
def test_a_lock_that_its_holder_has_just_removed(monkeypatch, own_folder, another):
    """Between its opening and its locking; by now another run may have made one of its own."""
    plain, locks = guard.fcntl.flock, []

    def flock(file, operation):
        locks.append(file)
        if len(locks) == 1:
            Path(".lock").unlink()
            if another:
                Path(".lock").touch()
        plain(file, operation)

    monkeypatch.setattr(guard.fcntl, "flock", flock)
    with locked(own_folder):
        assert len(locks) == 2 and Path(".lock").read_text().startswith(f"process {os.getpid()} ")
        assert os.path.samestat(os.stat(".lock"), os.fstat(locks[1]))
    assert os.listdir() == []


def test_a_lock_that_cannot_be_opened(own_folder):
    Path(".lock").mkdir()
    with pytest.raises(UserError, match="cannot write .*.lock: Is a directory"), locked(own_folder):
        pass


def test_a_folder_that_is_gone_in_the_end(own_folder):
    Path("a").mkdir()
    with locked(Path("a")):
        Path("a/.lock").unlink()
        Path("a").rmdir()


def send(*names, before="", after=""):
    """Send signals to a process in StopSignals, 0.05 s apart: (status, stdout, stderr)."""
    code = (
        f"import os, signal, time\nfrom training.guard import StopSignals\n{before}\n"
        "with StopSignals() as stop:\n"
        f"    for name in {names}:\n"
        "        os.kill(os.getpid(), getattr(signal, name))\n        time.sleep(0.05)\n"
        f"    {after}\n    print('saved', stop.received, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=WITH_PATH, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ENDS)
def test_one_signal_is_noted(name):
    number = int(getattr(signal, name))
    status, stdout, stderr = send(name)
    assert status == 0 and stdout == f"saved {number}\n" and f"{name}: saving" in stderr


@pytest.mark.parametrize("name", ENDS)
def test_a_handler_that_cannot_write(name):
    number = int(getattr(signal, name))
    for broken in ("os.close(2)", "import sys; sys.stderr = None"):
        assert send(name, before=broken)[:2] == (0, f"saved {number}\n")


def test_two_that_insist_end_at_once():
    assert send("SIGTERM", "SIGINT")[:2] == (128 + signal.SIGINT, "")
    assert send("SIGHUP", "SIGINT", "SIGINT")[:2] == (128 + signal.SIGINT, "")


@pytest.mark.skipif("SIGHUP" not in ENDS, reason="needs SIGHUP")
def test_a_hang_up_comes_twice_and_a_warning_before_the_end():
    assert send("SIGHUP", "SIGHUP", "SIGTERM")[:2] == (0, f"saved {int(signal.SIGHUP)}\n")
    assert send("SIGUSR1", "SIGTERM")[:2] == (0, f"saved {int(signal.SIGUSR1)}\n")
    assert send("SIGTERM", "SIGHUP")[:2] == (0, f"saved {int(signal.SIGTERM)}\n")


@pytest.mark.skipif("SIGHUP" not in ENDS, reason="needs SIGHUP")
def test_a_run_under_nohup_goes_on():
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert send("SIGHUP", before=ignored) == (0, "saved 0\n", "")


def test_a_system_with_fewer_signals(monkeypatch):
    """Windows has SIGINT and SIGTERM alone."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        monkeypatch.delattr(signal, name, raising=False)
    with StopSignals() as stop:
        assert set(stop.before) == {signal.SIGINT, signal.SIGTERM}


def test_handlers_are_put_back():
    before = {name: signal.getsignal(getattr(signal, name)) for name in ENDS}
    with StopSignals():
        assert signal.getsignal(signal.SIGINT) != before["SIGINT"]
    assert {name: signal.getsignal(getattr(signal, name)) for name in ENDS} == before


def last(name):
    return torch.load(list_checkpoints(Path("checkpoints") / name)[-1], weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    command = ["main.py", *map(str, FLAGS), "--experiment_name", "a"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.chdir(folder)
        patch.setattr(sys, "argv", command)
        run(main)
    assert end.value.code == 0
    return torch.load(list_checkpoints(folder / "checkpoints" / "a")[-1], weights_only=True)


@pytest.mark.parametrize("name", ENDS)
def test_a_signal_to_a_whole_pipeline_loses_nothing(cli, whole, name):
    """As a terminal sends it: `tee` dies first, and the run prints into a pipe without a reader."""
    flags = [*FLAGS, "--experiment_name", "a"]
    words = " ".join(map(str, [sys.executable, ROOT / "main.py", *flags]))
    shell = subprocess.Popen(
        ["bash", "-c", f"{words} 2>&1 | tee log"],
        env=WITH_PATH,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(getattr(signal, n), signal.SIG_DFL) for n in ENDS],
    )
    lock, deadline = Path("checkpoints/a/.lock"), time.monotonic() + 100
    while not Path("checkpoints/a/model_epoch_1.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(shell.pid, getattr(signal, name))
    shell.wait(timeout=100)
    while lock.exists() and time.monotonic() < deadline:  # the shell does not wait for the run
        time.sleep(0.01)
    assert 8 <= last("a")["step"] < whole["step"]
    assert "Traceback" not in Path("log").read_text()
    assert cli("main", *flags)[0] == 0
    end = last("a")
    assert all(same(whole[key], end[key]) for key in PARTS)

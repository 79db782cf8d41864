"""Protects a training run: its folder from a second run, its work from signals."""

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # errors of flock for a lock that is held
INSISTING = {"SIGINT", "SIGTERM"}  # from a person or a machine: a second one ends the run at once
# sent by a terminal that hangs up, and by schedulers some time before they end a job
WARNING = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"}


def tell(line: str) -> None:
    """Write a line to stderr, unbuffered, as a signal handler must; never raises."""
    with contextlib.suppress(Exception):
        os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which is released when this process ends, however it ends.

    If the system or the file system has no locks, continues without one and says so on stderr.
    Raises UserError, naming the other process, if another process holds it.
    """
    lock = _take_lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
            os.close(lock)


def _take_lock(folder: Path) -> int | None:
    """Open and lock `.lock` in `folder`; returns None if there are no locks."""
    if fcntl is None:
        return _no_locks(folder, "this system")
    path = folder / ".lock"
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                break
        except FileNotFoundError:
            pass
        except OSError as error:
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            if error.errno in HELD:
                holder = holder or "another process"
                raise UserError(f"--experiment_name {folder.name}: in use by {holder}") from None
            if not holder:  # it was created just now, and nobody uses it
                path.unlink(missing_ok=True)
            return _no_locks(folder, "its file system")
        os.close(lock)  # its holder has just removed it: try a new one
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk: the lock works without its text
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode())
    return lock


def _no_locks(folder: Path, what: str) -> None:
    line = f"{folder}: {what} has no file locks, so a second run there would not be noticed"
    print(line, file=sys.stderr)


class StopSignals:
    """In a `with` block, signals to stop are only recorded, so that the work can be saved.

    A second SIGINT or SIGTERM ends the process at once. A second one of the others does not, as
    they come in pairs (a dying shell passes on a SIGHUP that its jobs have already received). If
    SIGHUP is ignored from the start, as under nohup, it stays ignored.

    Attributes:
        received: the number of the first signal, or 0 if there was none.
    """

    def __init__(self):
        self.received, self.insisted, self.when = 0, False, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        for name in INSISTING | WARNING:
            number = getattr(signal, name, None)
            if number is None:  # Windows has only two of them
                continue
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        name, line = signal.Signals(number).name, "saving after this step"
        if name in INSISTING:
            echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.when < 1
            if self.insisted and not echo:  # torchrun forwards what the terminal has already sent
                os._exit(128 + number)  # files are replaced whole, so this damages none
            self.insisted, self.when = True, time.monotonic()
            line += "; send it again to stop at once"
        self.received = self.received or number
        tell(f"\n{name}: {line}")

"""What guards a training run: its folder against a second run, its work against a signal."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with this process however that ends.

    Raises UserError, naming the other process, when it is held already.
    """
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    while True:
        file = open(path, "a+")  # noqa: SIM115, open as long as it is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise UserError(f"--experiment_name {folder.name}: in use by {holder}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # its holder has just removed it: take a new one
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


class StopSignals:
    """In a `with`, the first SIGINT or SIGTERM is only noted; a second one ends the process.

    Attributes:
        received: the signal's number, 0 before there is one.
    """

    def __init__(self):
        self.received, self.when = 0, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.when < 1
        if self.received and not echo:  # torchrun passes on what a terminal has sent already
            os._exit(128 + number)  # files are replaced whole, so this harms none
        self.received, self.when = number, time.monotonic()
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; once more ends at once\n".encode())

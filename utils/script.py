"""How a script ends: one line for bad input, and no work lost to output that cannot be written."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from config import UserError, program


class _Output:
    """A stdout or stderr that never fails: what cannot be written is dropped.

    A pipe whose reader is gone, a full disk, a terminal that hung up, or a stream that was closed
    before the start (then it is None) must not cost a script its work. After a failure, all further
    output is dropped. Characters that the encoding lacks are escaped, like \\xb1.
    """

    def __init__(self, stream: Any):
        self.stream = open(os.devnull, "w") if stream is None else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.stream = open(os.devnull, "w")
        expected = getattr(error, "errno", None) in (errno.EPIPE, errno.EIO)  # the reader is gone
        if not expected and self is not sys.stderr:
            print(f"stdout: {error}; all further output is dropped", file=sys.stderr)


def _secure_output() -> None:
    """From now on, no failure of stdout or stderr raises an error."""
    for number in range(3):  # a checkpoint could take a closed one's number and get the prints
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stderr", "stdout"):
        if not isinstance(getattr(sys, name), _Output):
            setattr(sys, name, _Output(getattr(sys, name)))


def _is_one_of_many() -> bool:
    """True for all but the first of the processes that `torchrun` started on a machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main`; bad input gives one line on stderr and exit status 2.

    The exit status reflects only the work: it stays 0 if just the output could not be written, as
    in `python generate.py | head -1`.
    """
    _secure_output()
    try:
        main()
    except UserError as error:
        line = " ".join(str(error).split())
        if error.speaks or not _is_one_of_many():
            print(f"{program()}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stdout.flush()
    sys.exit(0)

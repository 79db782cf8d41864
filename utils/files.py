"""Files: written whole or not at all, with names that are checked before the work starts."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from config import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` with `data` in one step: a reader, or a crash, sees the old file or the new.

    If `path` is a link, its target is replaced. A device or a pipe is written to, not replaced.
    Raises UserError if the disk is full, the folder cannot be written, or the file is read-only.
    """
    path = Path(path)
    try:
        if is_stream(path):
            with open(path, "ab") as stream:
                stream.write(data)
            return
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, data, mode)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    # a unique name, since others may write the same file; a short one, since the file's own name
    # may be as long as names can get
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        if mode is not None:
            with contextlib.suppress(OSError):  # file systems without permissions
                temporary.chmod(mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def _sync(number: int) -> None:
    """fsync, if the file system supports it."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be opened and synced.

    They cannot on Windows, CIFS and some FUSE mounts; the file is in place all the same.
    """
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def is_stream(path: Path) -> bool:
    """True for what must be written to, never replaced: devices, pipes, open file descriptors."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    by_number = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return by_number or not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _mode(target: Path) -> int | None:
    """The permissions of a file that will be replaced, or None if there is no file.

    Raises OSError if it is a folder or read-only, which would not stop a rename, or root.
    """
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(None, "it is a folder")
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise PermissionError(None, "it is read-only")
    return stat.S_IMODE(mode)


def writable_folder(path: Path) -> Path:
    """Create a folder and make sure that files can be written there. Raises UserError if not."""
    probe = Path(path) / f".{secrets.token_hex(8)}.tmp"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)  # another process may tidy up the folder
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output folder {path}: cannot be written: {reason}") from None
    return Path(path)


def check_ending(path: str, flag: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError if the name does not match what is written, as `s.jpg` for a PNG.

    allowed: endings like ".png", in lower case. A device or a pipe may have any name.
    """
    if Path(path).suffix.lower() not in allowed and not is_stream(Path(path)):
        raise UserError(f"{flag} {path}: must end in {' or '.join(allowed)}")


def check_different(paths: dict[str, str]) -> None:
    """Raise UserError if two flags name the same file.

    paths: by flag, without its dashes. Several flags may name the same device or pipe.
    """
    taken: dict[str, str] = {}
    for flag, path in paths.items():
        other = taken.setdefault(os.path.realpath(path), flag)
        if other != flag and not is_stream(Path(path)):
            raise UserError(f"--{flag} {path}: --{other} writes to the same file")


def check_output(path: str, flag: str, allowed: tuple[str, ...]) -> Path:
    """Make sure, before hours of work, that the result can be written to `path`.

    Creates its folder. Raises UserError if the ending is not one of `allowed`, or if the file
    cannot be written.
    """
    check_ending(path, flag, allowed)
    if not is_stream(Path(path)):
        try:
            target = Path(os.path.realpath(path))
            _mode(target)
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written: {error.strerror}") from None
        writable_folder(target.parent)
    return Path(path)

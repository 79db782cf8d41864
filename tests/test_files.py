"""Files are replaced whole; devices, links and protected files are treated as what they are."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from config import UserError
from utils.checkpoint import remove_leftovers
from utils.files import check_ending, check_output, writable_folder, write_atomically

FULL = Path("/dev/full")


def only(name, data):
    """The folder holds this file and nothing else."""
    assert os.listdir() == [name] and Path(name).read_bytes() == data


def test_a_device_is_written_to_and_stays():
    write_atomically(Path(os.devnull), b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    Path("link").symlink_to(os.devnull)
    write_atomically(Path("link"), b"x")
    assert Path("link").is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_device_that_takes_nothing():
    with pytest.raises(UserError, match="cannot write /dev/full: No space left"):
        write_atomically(FULL, b"x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_stays():
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_bytes()))
    reader.start()
    write_atomically(Path("pipe"), b"x" * 100_000)
    reader.join(timeout=20)
    assert read == [b"x" * 100_000] and stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert os.listdir() == ["pipe"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_an_open_file_by_its_number_goes_on():
    with open("log", "wb") as log:
        log.write(b"printed\n")
        log.flush()
        write_atomically(Path(f"/dev/fd/{log.fileno()}"), b"written\n")
    only("log", b"printed\nwritten\n")


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_leads_to_the_new_file(exists):
    Path("real").mkdir()
    if exists:
        Path("real/file").write_bytes(b"old")
    Path("link").symlink_to("real/file")
    write_atomically(Path("link"), b"new")
    assert Path("link").is_symlink() and Path("real/file").read_bytes() == b"new"
    assert os.listdir("real") == ["file"]


def test_a_link_that_leads_to_itself():
    Path("link").symlink_to("link")
    with pytest.raises(UserError, match="cannot write link"):
        write_atomically(Path("link"), b"new")


def test_a_read_only_file_is_refused_by_root_too():
    Path("a.png").write_bytes(b"old")
    Path("a.png").chmod(0o444)
    with pytest.raises(UserError, match="cannot write a.png: it is read-only"):
        write_atomically(Path("a.png"), b"new")
    with pytest.raises(UserError, match="--output a.png: cannot be written: it is read-only"):
        check_output("a.png", "--output", (".png",))
    only("a.png", b"old")


def test_a_folder_is_refused():
    Path("a.png").mkdir()
    with pytest.raises(UserError, match="a.png.*folder"):
        write_atomically(Path("a.png"), b"new")
    with pytest.raises(UserError, match="--output a.png: cannot be written: it is a folder"):
        check_output("a.png", "--output", (".png",))


def test_permissions_stay_and_new_ones_are_usual():
    Path("usual").touch()
    write_atomically(Path("new"), b"")
    assert Path("new").stat().st_mode == Path("usual").stat().st_mode
    Path("secret").touch(0o600)
    write_atomically(Path("secret"), b"new")
    assert stat.S_IMODE(Path("secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, os.fsdecode(b"\xff\xfe.png"), "a b\n.png"])
def test_any_name_that_a_file_can_have(name):
    try:
        Path(name).touch()
    except OSError:
        pytest.skip("not on this file system")
    assert check_output(name, "--output", (Path(name).suffix,)) == Path(name)
    write_atomically(Path(name), b"new")
    only(name, b"new")


def test_a_name_that_is_too_long():
    with pytest.raises(UserError, match="too long"):
        write_atomically(Path("a" * 256), b"new")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_folders_that_cannot_be_opened_or_synced(monkeypatch, number, call):
    """CIFS, FUSE and Windows."""
    real = getattr(os, call)

    def failing(what, *arguments, **options):
        folder = os.path.isdir(what) if call == "open" else stat.S_ISDIR(os.fstat(what).st_mode)
        if folder:
            raise OSError(number, os.strerror(number))
        return real(what, *arguments, **options)

    monkeypatch.setattr(os, call, failing)
    write_atomically(Path("a.bin"), b"old")
    write_atomically(Path("a.bin"), b"new")
    only("a.bin", b"new")


def test_a_disk_that_fails_leaves_the_old_file(monkeypatch):
    write_atomically(Path("a.bin"), b"old")

    def failing(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="cannot write a.bin: Input/output error"):
        write_atomically(Path("a.bin"), b"new")
    only("a.bin", b"old")


def test_an_interrupted_write_leaves_the_old_file_alone(monkeypatch):
    write_atomically(Path("a.bin"), b"old")

    def interrupted(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(Path("a.bin"), b"new")
    only("a.bin", b"old")


def test_endings_say_what_is_written():
    for name in ("s.png", "S.PNG", "a.b/s.png", os.devnull):
        check_ending(name, "--output", (".png",))
    for name in ("s.jpg", "s", "png", "s.png.gz", "run_v1.5"):
        with pytest.raises(UserError, match=f"^--output {name}: must end in .png$"):
            check_ending(name, "--output", (".png",))
    with pytest.raises(UserError, match="^--animate film.mp4: must end in .gif or .png$"):
        check_ending("film.mp4", "--animate", (".gif", ".png"))


def test_an_output_is_checked_before_there_is_one():
    assert check_output("new/folder/s.png", "--output", (".png",)) == Path("new/folder/s.png")
    assert os.listdir("new/folder") == []
    Path("file").touch()
    with pytest.raises(UserError, match="file"):
        check_output("file/s.png", "--output", (".png",))
    assert check_output(os.devnull, "--output", (".png",)) == Path(os.devnull)
    with pytest.raises(UserError, match="cannot be written"):
        writable_folder(Path("file"))


def test_a_folder_is_writable_though_another_process_tidies_it_up(monkeypatch):
    touch = Path.touch

    def touch_and_lose(path, **options):
        touch(path, **options)
        remove_leftovers(path.parent)  # as the first process of a training run does

    monkeypatch.setattr(Path, "touch", touch_and_lose)
    assert writable_folder(Path("shared")) == Path("shared")
    assert os.listdir("shared") == []

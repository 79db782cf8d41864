"""Checkpoints: written whole or not at all, loaded without running code, self-describing.

A checkpoint is a plain dict that `torch.load(..., weights_only=True)` reads. `main.py` writes all
keys. Files to share keep the first six, with the weights in half precision:
`python -m utils.checkpoint IN OUT` makes one, and sampling flags such as `--guidance 1` record how
its network is best sampled.

    format, version   what this is
    config            the fields of `TrainConfig` as a plain dict
    data              the fields of `DatasetInfo`
    sampling          fields of `SamplingConfig` that suit this network best; may be empty
    ema               the averaged weights, which are used for sampling
    network, optimizers, taken, generator, device, step, epoch, count, minutes, history
                      what training needs to resume; for distillation also `fake` and `critic`
    skipped, changes, environments
                      what happened in the run: steps left out, changed settings, machines

Version 1 had neither `data` nor `sampling`, and kept the label shares among the weights.
"""

import contextlib
import dataclasses
import io
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from config import DATA_DIR, SamplingConfig, TrainConfig, UserError, from_dict, parse
from utils.data_loader import DatasetInfo, describe
from utils.files import write_atomically
from utils.script import run

FORMAT, VERSION = "diffusion_model", 2
SHARES = "condition.label_shares"  # among the weights of version 1


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write `checkpoint`, stamped with format and version, atomically to `path`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, flag: str = "--checkpoint", device="cpu") -> dict:
    """Read a checkpoint of this version or an earlier one; in a folder, the newest one.

    Its `config` comes back as a checked `TrainConfig`, and its `data` as a `DatasetInfo`. Raises
    UserError, naming `flag`, if the file is missing or damaged, or of another kind or version.
    """
    try:
        path = newest(path)
        if path.is_dir():
            raise UserError(f"{flag} {path}: holds no checkpoint like model_epoch_0.pth")
        if not path.is_file():
            raise UserError(f"{flag} {path}: no such file")
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}") from None
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # half a dozen kinds, depending on which byte is wrong
        raise UserError(f"{flag} {path}: not a checkpoint, or a damaged one") from None
    if not isinstance(checkpoint, dict) or str(checkpoint.get("format")) != FORMAT:
        raise UserError(f"{flag} {path}: not a checkpoint of this project")
    version = str(checkpoint.get("version"))
    if version not in ("1", str(VERSION)):
        raise UserError(f"{flag} {path}: checkpoint version {version[:20]}, must be 1 to {VERSION}")
    try:
        check_weights(checkpoint["ema"], path.stat().st_size)
        checkpoint["config"] = from_dict(TrainConfig, checkpoint["config"])
        if version == "1":
            upgrade(checkpoint)
        checkpoint["data"] = DatasetInfo.from_dict(checkpoint["data"])
        from_dict(SamplingConfig, checkpoint["sampling"])
    except (UserError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {path}: damaged checkpoint: {reason}") from None
    return checkpoint


def upgrade(checkpoint: dict) -> None:
    """Upgrade a checkpoint of version 1, when all images were 28 x 28 and grey, to this version."""
    shares = checkpoint["ema"].pop(SHARES, torch.full((10,), 0.1))
    checkpoint.get("network", {}).pop(SHARES, None)
    data = describe(checkpoint["config"].dataset, torch.empty(0, 1, 28, 28))
    checkpoint["data"] = dataclasses.asdict(data) | {"label_shares": shares.tolist()}
    checkpoint["sampling"] = {}


def check_archive(path: Path) -> None:
    """Check the file's sizes and checksums, which torch.load trusts. Raises ValueError."""
    with zipfile.ZipFile(path) as archive:
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        total = sum(entry.file_size for entry in archive.infolist())
        if not stored or total > path.stat().st_size or archive.testzip() is not None:
            raise ValueError("not an archive that torch.save wrote")


def check_weights(state: dict, file_size: int) -> None:
    """Weights must be finite, float and no larger than the file. Raises TypeError or ValueError."""
    total = 0
    for name, weight in dict.items(state):
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise TypeError("ema must hold tensors by name")
        total += weight.numel() * weight.element_size()
        if weight.layout != torch.strided or not weight.is_floating_point() or total > file_size:
            raise ValueError("its weights are not what they should be")
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite")


def load_weights(net: torch.nn.Module, state: dict, source: str, assign: bool = False) -> None:
    """Copy `state` into `net`; with `assign`, its tensors themselves become the weights.

    Raises UserError, naming `source`, if names or shapes differ.
    """
    try:
        net.load_state_dict(state, assign=assign)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(f"{source}: its weights do not fit the network it describes") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """The `model_epoch_<N>.pth` files of a run, in order of N."""
    found = [path for path in Path(folder).glob("*") if epoch_number(path) is not None]
    return sorted(found, key=epoch_number)


def newest(path: str | Path) -> Path:
    """`path`, or if it is a run's folder, the newest checkpoint in it."""
    path = Path(path)
    return next(iter(list_checkpoints(path)[-1:]), path) if path.is_dir() else path


def epoch_number(path: Path) -> int | None:
    """N of `model_epoch_<N>.pth`, None for other names."""
    match = re.fullmatch(r"model_epoch_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of a run, if they can be deleted."""
    for path in list_checkpoints(folder)[:-keep]:
        with contextlib.suppress(OSError):  # a folder; on Windows, a file that is open
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of interrupted writes; nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        raise UserError(
            "usage: python -m utils.checkpoint IN OUT.pth [sampling flags], where IN is a .pth or a"
            " run's folder"
        )
    source, target = newest(sys.argv[1]), Path(sys.argv[2])
    checkpoint = load_checkpoint(source, flag="IN")
    if source.resolve() == target.resolve():
        raise UserError(f"OUT {target}: is the file to read; must be another")
    sampling = checkpoint["sampling"] | parse(SamplingConfig, "", sys.argv[3:]).carried()
    config = {**vars(checkpoint["config"]), "data_dir": DATA_DIR, "test_dir": None}  # anonymized
    config["teacher"] = config["teacher"] and Path(config["teacher"]).name
    from models.trained import load_trained  # which imports this module
    from sampling.draw import resolve

    model = load_trained(source, "cpu", "IN")
    resolve(SamplingConfig(), dataclasses.replace(model, sampling=sampling))  # do they fit?
    half = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    data = dataclasses.asdict(checkpoint["data"])
    shared = {"config": config, "data": data, "sampling": sampling, "ema": half}
    save_checkpoint(target, shared)


if __name__ == "__main__":
    run(main)

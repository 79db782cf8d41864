"""Checkpoints: written whole or not at all, loaded without running code, explaining themselves.

A checkpoint is a plain dict that `torch.load(..., weights_only=True)` reads. `main.py` writes all
of it; files to share keep the first four keys, the weights in half precision
(`python -m utils.checkpoint IN OUT` makes one).

    format, version   what this is
    config            the fields of `TrainConfig` as a plain dict
    ema               the averaged weights, the ones to sample from
    network, optimizers, generator, device, step, epoch, minutes, history
                      what training needs to go on
"""

import io
import re
import sys
import warnings
from pathlib import Path

import torch

from config import TrainConfig, UserError, from_dict, run
from utils.files import write_atomically

FORMAT, VERSION = "diffusion_model", 1


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write `checkpoint`, stamped with format and version, atomically to `path`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **checkpoint}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, flag: str = "--checkpoint", device="cpu") -> dict:
    """Read a checkpoint; its `config` comes back as a checked `TrainConfig`.

    Raises UserError, naming `flag`, when the file is missing, damaged, of another kind or version.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises half a dozen kinds, depending on which byte is wrong
        raise UserError(f"{flag} {path}: not a checkpoint, or a damaged one") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{flag} {path}: not a checkpoint of this project")
    if checkpoint.get("version") != VERSION:
        raise UserError(
            f"{flag} {path}: checkpoint version {checkpoint.get('version')!r}, must be {VERSION}"
        )
    try:
        checkpoint["config"] = from_dict(TrainConfig, checkpoint["config"])
        if not all(isinstance(weight, torch.Tensor) for weight in dict.values(checkpoint["ema"])):
            raise TypeError("ema must hold tensors")
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {path}: damaged checkpoint: {error}") from None
    return checkpoint


def load_weights(net: torch.nn.Module, state: dict, source: str) -> None:
    """Copy `state` into `net`. Raises UserError, naming `source`, where names or shapes differ."""
    try:
        net.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(f"{source}: its weights do not fit the network it describes") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """The `model_epoch_<N>.pth` files of a run, by rising N."""
    found = [path for path in Path(folder).glob("*") if epoch_number(path) is not None]
    return sorted(found, key=epoch_number)


def epoch_number(path: Path) -> int | None:
    """N of `model_epoch_<N>.pth`, None for other names."""
    match = re.fullmatch(r"model_epoch_(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints of a run."""
    for path in list_checkpoints(folder)[:-keep]:
        path.unlink()


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python -m utils.checkpoint IN.pth OUT.pth")
    checkpoint = load_checkpoint(sys.argv[1], flag="IN")
    half = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    config = {**vars(checkpoint["config"]), "data_dir": TrainConfig.data_dir}  # nobody else's path
    save_checkpoint(Path(sys.argv[2]), {"config": config, "ema": half})


if __name__ == "__main__":
    run(main)

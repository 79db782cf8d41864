"""Measures the published figures of the shipped weights, one after another."""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.common import FOLDER
from config import DATA_DIR, DEVICES, UserError, setting
from utils.provenance import SOURCE, source_hash

SEED = 3000  # of published samples; nothing was chosen with it
WEIGHTS = "checkpoints/pretrained"
SHIPPED = {
    "unet": f"--path_to_model {WEIGHTS}/unet.pth",
    "resnet": f"--path_to_model {WEIGHTS}/resnet.pth",
    "cnn": f"--path_to_model {WEIGHTS}/cnn.pth",
    "one_call": f"--path_to_model {WEIGHTS}/unet_fewstep.pth",
    "two_calls": f"--path_to_model {WEIGHTS}/unet_fewstep.pth --steps 2",
}
FIVE_SEEDS = f"validation.py --seed {SEED} --seeds 5"
INCEPTION = "--features inception --dims 768"


def measurements() -> dict[str, tuple[float, str]]:
    """For each result: minutes on two CPU cores, and the command after `python`."""
    minutes = {"unet": 8, "resnet": 15, "cnn": 6, "one_call": 2, "two_calls": 2}
    found = {
        "sample": (4, "-m benchmarks sample --num_samples 250"),
        "floors": (24, "-m benchmarks floors"),
    }
    for name, flags in SHIPPED.items():
        found[name] = minutes[name], f"{FIVE_SEEDS} {flags}"
    for name, flags in SHIPPED.items():
        few = f"--num_samples 2000 {INCEPTION}"
        found[f"{name}_inception"] = 3, f"validation.py --seed {SEED} {flags} {few}"
    for name in ("unet", "resnet", "cnn"):
        found[f"{name}_inception_10000"] = 60, f"{FIVE_SEEDS} {SHIPPED[name]} {INCEPTION}"
    found["unet_guided"] = 5, f"{FIVE_SEEDS} {SHIPPED['unet']} --guidance 1.5"
    for name in ("unet", "one_call"):
        found[f"{name}_memorization"] = 4, f"validation.py {SHIPPED[name]} --memorization"
    for name in ("unet", "resnet", "cnn"):
        flags = "--likelihood --num_samples 10000 --flow 50"
        found[f"{name}_likelihood"] = 4, f"validation.py {SHIPPED[name]} {flags}"
    for name in ("unet", "one_call"):
        flags = f"--seed {SEED} --num_samples 50000 --tstr"
        found[f"{name}_tstr"] = 60, f"validation.py {SHIPPED[name]} {flags}"
    found["guidance"] = 6, "-m benchmarks guidance"
    found["faults"] = 10, "-m benchmarks faults --num_samples 2000"
    calibration = f"--shuffles 1 {SHIPPED['one_call']} --seed {SEED}"
    found["calibration"] = 6, f"-m benchmarks calibration {calibration}"
    found["samplers_inception-768"] = 400, "-m benchmarks samplers --inception 2000 --variety"
    return found


@dataclass(frozen=True)
class EverythingConfig:
    """Which measurements to make; existing results of this code are kept."""

    only: str | None = setting(None, "only these, as in unet,floors; default all")
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def everything(cfg: EverythingConfig) -> None:
    """Measure published figures of the shipped weights; `report --take` publishes them.

    After an interruption, the same command continues.
    """
    chosen = chosen_measurements(cfg.only)
    commands = {name: command_for(name, line, cfg) for name, (_, line) in chosen.items()}
    left = [name for name in chosen if not measured(name, commands[name])]
    hours = sum(chosen[name][0] for name in left) / 60
    print(f"{len(left)} of {len(chosen)} to measure: about {hours:.1f} hours on two CPU cores")
    for number, name in enumerate(left, 1):
        minutes, line = chosen[name]
        print(f"\n== {number} of {len(left)}: {name}, about {minutes:g} min", flush=True)
        start = time.monotonic()
        done = subprocess.run([sys.executable, *commands[name]])
        if done.returncode or not measured(name, commands[name]):
            raise UserError(f"{name}: python {line} failed")
        print(f"== {name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)


def command_for(name: str, line: str, cfg: EverythingConfig) -> list[str]:
    """The arguments of `python` for a measurement, with this machine's data and device."""
    command = shlex.split(line)
    if command[0] == "validation.py":
        command += ["--json", str(FOLDER / f"{name}.json")]
    if name != "sample":  # it needs no data
        command += ["--data_dir", cfg.data_dir]
    return [*command, "--device", cfg.device]


def chosen_measurements(only: str | None) -> dict[str, tuple[float, str]]:
    """All measurements, or those in `only`. Raises UserError for unknown names."""
    every = measurements()
    names = only.split(",") if only else list(every)
    for name in names:
        if name not in every:
            raise UserError(f"--only {only}: must be one or more of {', '.join(every)}")
    return {name: every[name] for name in names}


def measured(name: str, command: list[str]) -> bool:
    """Whether there is a result of this command by the current code."""
    try:
        result = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
        made = result.get("provenance", result)
        same = made["command"] == shlex.join(["python", *command])
        return same and made["source"] == source_hash(SOURCE)
    except (OSError, ValueError, KeyError, AttributeError):  # missing, or of something else
        return False

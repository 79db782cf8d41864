"""How a result was made: the code, the versions, the hardware, the date and the command."""

import contextlib
import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import distributed

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("config.py", "main.py", "generate.py", "validation.py")
SOURCE += ("models", "sampling", "training", "scoring", "benchmarks", "utils")
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pytorch_fid")


def provenance(device: torch.device) -> dict[str, str | dict | None]:
    """What someone else needs to get the same figures, as plain values.

    `commit` from `commit()`, `source` (the hash of all of the project's code, which identifies it
    where there is no git), `versions` of Python and the loaded packages, `hardware`, `date` (ISO
    8601, UTC) and `command`.
    """
    loaded = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    versions = {name: str(module.__version__) for name, module in loaded.items()}
    return {
        "command": command(),
        "commit": commit(),
        "source": source_hash(SOURCE),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **versions},
    }


def command() -> str:
    """The current command line, as you can type it again in the project's folder.

    A file in a subfolder only runs with `python -m`, which puts the file's path in argv.
    """
    script, *arguments = sys.argv
    with contextlib.suppress(ValueError):
        parts = Path(script).resolve().relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1:
            script = ".".join(parts).removesuffix(".__main__")
            return shlex.join(["python", "-m", script, *arguments])
    return shlex.join(["python", script, *arguments])


def commit() -> str | None:
    """The commit of this code, with "+changes" if files that git tracks differ from it.

    Documentation does not count, because no result depends on it. None if there is no git, or the
    code is not a clone.
    """
    # with the repository named, git neither mistakes an outer one for ours nor checks its owner
    git = ["git", "--no-optional-locks", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    tracked = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!*.md"]
    answers = []
    try:
        for question in (["rev-parse", "--short=12", "HEAD"], tracked):
            done = subprocess.run([*git, *question], cwd=ROOT, capture_output=True, text=True)
            done.check_returncode()
            answers.append(done.stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0] + "+changes" * bool(answers[1])


def source_hash(rooms: Sequence[str]) -> str:
    """The first 12 digits of SHA-256 of all `.py` files in `rooms`: files and folders of ROOT.

    It changes with every letter and every name, so what is stored under it belongs to this code.
    """
    digest = hashlib.sha256()
    for room in rooms:
        place = ROOT / room
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            text = path.read_text(encoding="utf-8")  # with any line endings
            name = path.relative_to(ROOT).as_posix()
            digest.update(f"{name} {len(text)}\n{text}".encode())
    return digest.hexdigest()[:12]


def hardware(device: torch.device) -> dict[str, str | int | None]:
    """The hardware: the CPU, the cores this process may use and its threads, the GPU if any."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has it, and it is more precise
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    affinity = getattr(os, "sched_getaffinity", None)
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "cpu": cpu,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }

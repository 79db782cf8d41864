"""The measurements behind the published tables: each prints a Markdown table, some draw a figure.

    python -m benchmarks floors    what real images score against the test set, by sample size
    python -m benchmarks faults    which metric notices which fault in real images
    python -m benchmarks calibration  do the stated spreads of the scores match their true spreads?
    python -m benchmarks features  images/s of the feature networks, and FID by pytorch-fid
    python -m benchmarks train     FID against minutes of training (--profile: where a step goes)
    python -m benchmarks speedrun  minutes of training until a given FID
    python -m benchmarks gpu       images/s of training and sampling on a GPU, with CUDA graphs
    python -m benchmarks sample    images/s of the shipped networks, and of ancestral sampling
    python -m benchmarks compare   FID of the shipped networks, real images and other programs
    python -m benchmarks samplers  FID against network calls, for each sampler
    python -m benchmarks guidance  FID and agreement with the label against the guidance scale
    python -m benchmarks all       most published figures of the shipped weights
    python -m benchmarks report    publish results and show them in the pages

Tables and figures are also written to outputs/benchmark/. Training and sampling use the code of
main.py and generate.py; scoring is not timed.
"""

import sys

from benchmarks.calibration import CalibrationConfig, calibrate
from benchmarks.comparison import CompareConfig, compare
from benchmarks.everything import EverythingConfig, everything
from benchmarks.gpu import GPUConfig, gpu
from benchmarks.report import ReportConfig, report
from benchmarks.ruler import FeaturesConfig, FloorsConfig, SpacesConfig, faults, features, floors
from benchmarks.sampling import (
    GuidanceConfig,
    SamplersConfig,
    SpeedConfig,
    guidance,
    sample,
    samplers,
)
from benchmarks.training import QualityConfig, speedrun, train_benchmark
from config import UserError, parse
from utils.device import pick_device
from utils.provenance import provenance
from utils.script import run

BENCHMARKS = {
    "floors": (FloorsConfig, floors),
    "faults": (SpacesConfig, faults),
    "calibration": (CalibrationConfig, calibrate),
    "features": (FeaturesConfig, features),
    "train": (QualityConfig, train_benchmark),
    "speedrun": (QualityConfig, speedrun),
    "gpu": (GPUConfig, gpu),
    "sample": (SpeedConfig, sample),
    "compare": (CompareConfig, compare),
    "samplers": (SamplersConfig, samplers),
    "guidance": (GuidanceConfig, guidance),
    "all": (EverythingConfig, everything),
    "report": (ReportConfig, report),
}


def main() -> None:
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r}: must be one of {', '.join(BENCHMARKS)}")
    kind, measure = BENCHMARKS[name]
    cfg = parse(kind, measure.__doc__, flags)
    measure(cfg)
    if name in ("all", "report"):
        return
    for key, value in provenance(pick_device(cfg.device)).items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        print(f"# {key}: {value}")


if __name__ == "__main__":
    run(main)

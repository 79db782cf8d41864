"""What the server of `tests.processes` does once for all its forks: imports, and the digits."""

import torch._dynamo  # noqa: F401  (every group of processes needs it)
import torchvision.datasets  # noqa: F401

import generate  # noqa: F401
import main  # noqa: F401
import tests.conftest  # noqa: F401  (which keeps the digits)
import validation  # noqa: F401
from utils.data_loader import load_dataset

for split in ("train", "test"):
    load_dataset("synthetic", "data", split)

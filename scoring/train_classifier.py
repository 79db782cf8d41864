"""Train the classifier whose features `validation.py --features mnist` uses.

    python -m scoring.train_classifier

It takes a few minutes on two cores. The same seed gives the same file on the same machine. The one
in checkpoints/pretrained/ is pinned by its SHA-256 in scoring/classifier.py, because scores made
with different classifiers cannot be compared.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from config import DATA_DIR, DEVICES, parse, setting
from scoring.classifier import accuracy, train_classifier
from utils.data_loader import load_dataset
from utils.device import pick_device
from utils.files import check_output, write_atomically
from utils.script import run


@dataclass(frozen=True)
class ClassifierConfig:
    """Which classifier to train."""

    epochs: int = setting(12, "passes over the training images", low=1)
    batch_size: int = setting(128, "images per step", low=2)
    lr: float = setting(1e-2, "peak learning rate of AdamW", above=0, high=1)
    seed: int = setting(0, "seed for weights, data order and augmentation", low=0, high=2**63 - 1)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")
    device: str = setting("auto", "device to run on", choices=DEVICES)
    output: str = setting("outputs/mnist_classifier.pth", "file to write")


def main() -> None:
    cfg = parse(ClassifierConfig, "Train the feature network of --features mnist.")
    device = pick_device(cfg.device)
    options = {"epochs": cfg.epochs, "batch_size": cfg.batch_size, "lr": cfg.lr, "seed": cfg.seed}
    train = load_dataset("mnist", cfg.data_dir, "train")
    test = load_dataset("mnist", cfg.data_dir, "test")
    check_output(cfg.output, "--output", (".pth",))
    net = train_classifier(train.images, train.labels, device, **options)
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in net.state_dict().items()}, buffer)
    write_atomically(Path(cfg.output), buffer.getvalue())
    print(f"test accuracy {accuracy(net, test.images, test.labels, device):.2%}")
    print(f"{cfg.output}: SHA-256 {hashlib.sha256(buffer.getvalue()).hexdigest()}")


if __name__ == "__main__":
    run(main)

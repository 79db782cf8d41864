"""Train the classifier whose features `validation.py --features mnist` uses.

    python classifier.py

A few minutes on two cores. The same seed gives the same file on the same machine; the one shipped
in checkpoints/pretrained/ is pinned by its SHA-256 in utils/features.py, because scores made with
different classifiers cannot be compared.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import DEVICES, parse, run, setting
from utils.data_loader import epoch_batches, load_dataset
from utils.device import pick_device
from utils.features import MNISTClassifier
from utils.files import writable_folder, write_atomically


@dataclass(frozen=True)
class ClassifierConfig:
    """What `classifier.py` trains."""

    epochs: int = setting(12, "passes over the training images", low=1)
    batch_size: int = setting(128, "images a step", low=2)
    lr: float = setting(1e-2, "peak learning rate of AdamW", above=0, high=1)
    seed: int = setting(0, "seed of weights, order and augmentation", low=0, high=2**63 - 1)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")
    device: str = setting("auto", "where to compute", choices=DEVICES)
    output: str = setting("outputs/mnist_classifier.pth", "file to write")


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small random affine maps of x (B, 1, H, W): 10 degrees, 10 % of size, 2 pixels of shift."""
    u = torch.rand(5, len(x), generator=generator).to(x) * 2 - 1
    angle, log_scale, shear = u[0] * math.radians(10), u[1] * 0.1, u[2] * 0.1
    cos, sin = angle.cos() * log_scale.exp(), angle.sin() * log_scale.exp()
    shift = u[3:] * 2 * 2 / x.shape[-1]  # 2 pixels, where the image is 2 units wide
    rows = [torch.stack([cos, shear - sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train_classifier(cfg: ClassifierConfig, device: torch.device) -> MNISTClassifier:
    """AdamW with a one-cycle learning rate on jittered images."""
    images, labels = load_dataset("mnist", cfg.data_dir, "train")
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    net = MNISTClassifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=0.05)
    steps = cfg.epochs * (len(images) // cfg.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=steps)
    for epoch in range(cfg.epochs):
        batches = list(epoch_batches(len(images), cfg.batch_size, cfg.seed, epoch))
        for index in tqdm(batches, desc=f"epoch {epoch}", unit="step"):
            x = jitter(images[index].float() / 255, generator)
            loss = F.cross_entropy(net(x)[1], labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: MNISTClassifier, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of images (N, 1, 28, 28) uint8 whose most likely class is the label."""
    logits = [net(batch.to(device).float() / 255)[1] for batch in images.split(500)]
    return (torch.cat(logits).argmax(1).cpu() == labels).float().mean().item()


def main() -> None:
    cfg = parse(ClassifierConfig, "Train the feature network of --features mnist.")
    device = pick_device(cfg.device)
    writable_folder(Path(cfg.output).parent)
    net = train_classifier(cfg, device)
    test = load_dataset("mnist", cfg.data_dir, "test")
    buffer = io.BytesIO()
    torch.save({key: value.cpu() for key, value in net.state_dict().items()}, buffer)
    write_atomically(Path(cfg.output), buffer.getvalue())
    print(f"test accuracy {accuracy(net, *test, device):.2%}")
    print(f"{cfg.output}: SHA-256 {hashlib.sha256(buffer.getvalue()).hexdigest()}")


if __name__ == "__main__":
    run(main)

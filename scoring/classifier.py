"""The project's own digit classifier: its features score images, its predictions sort them."""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import PRETRAINED, UserError
from utils.data_loader import DIGITS, DatasetInfo, epoch_batches
from utils.device import autocast

BATCH_SIZE = 128
CLASSIFIER_PATH = PRETRAINED / "mnist_classifier.pth"
CLASSIFIER_SHA256 = "0c199308cc1138fb943f3db0c9b78c684fd207e7a198041866b85f9fa65ecabd"


def reads(data: DatasetInfo) -> bool:
    """True if the shipped classifier can read the images: digits in the format of MNIST."""
    return data.shape == DigitClassifier.shape and data.class_names == DIGITS


class DigitClassifier(nn.Module):
    """A small convolutional classifier; its last hidden layer provides the features.

    The defaults are for MNIST; `--tstr` trains others, on images (C, H, W) of any size.
    """

    dim = 128
    shape = (1, 28, 28)  # of the images that the shipped classifier reads

    def __init__(self, channels: int = 1, num_classes: int = len(DIGITS)):
        super().__init__()

        def block(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        self.body = nn.Sequential(
            *block(channels, 24), *block(24, 24), nn.MaxPool2d(2),
            *block(24, 48), *block(48, 48), nn.MaxPool2d(2),
            *block(48, self.dim), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in [0, 1] -> features (B, 128) >= 0 and logits (B, num_classes)."""
        features = self.body(x)
        return features, self.head(features)


def load_classifier(device="cpu") -> DigitClassifier:
    """The shipped classifier. Raises UserError if its file is missing or has been altered."""
    try:
        digest = hashlib.sha256(CLASSIFIER_PATH.read_bytes()).hexdigest()
    except OSError:
        raise UserError(f"{CLASSIFIER_PATH}: missing; restore it with git checkout") from None
    if digest != CLASSIFIER_SHA256:
        raise UserError(f"{CLASSIFIER_PATH}: damaged, its SHA-256 is {digest[:12]}...")
    net = DigitClassifier()
    net.load_state_dict(torch.load(CLASSIFIER_PATH, map_location="cpu", weights_only=True))
    return net.to(device, memory_format=torch.channels_last).eval()


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine maps of x (B, C, H, W): rotation by up to 10 degrees, 10 % in size, a shear of
    0.1, and a shift of 2 pixels if the image is square."""
    u = torch.rand(5, len(x), generator=generator).to(x) * 2 - 1
    angle, log_scale, shear = u[0] * math.radians(10), u[1] * 0.1, u[2] * 0.1
    cos, sin = angle.cos() * log_scale.exp(), angle.sin() * log_scale.exp()
    shift = u[3:] * 2 * 2 / x.shape[-1]  # the image is 2 units wide
    rows = [torch.stack([cos, shear - sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    *,
    epochs: int = 12,
    batch_size: int = BATCH_SIZE,
    lr: float = 1e-2,
    seed: int = 0,
    num_classes: int = len(DIGITS),
    precision: str = "fp32",
) -> DigitClassifier:
    """A classifier trained on images (N, C, H, W) uint8, labels (N,) < num_classes int64; N >= 2.

    Trained by AdamW with a one-cycle learning rate that peaks at `lr`, on jittered images. With
    `precision` bf16 the network computes in bfloat16; weights and updates stay float32.
    """
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitClassifier(images.shape[1], num_classes).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    steps_per_epoch = len(images) // min(batch_size, len(images))
    steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    with tqdm(total=steps, desc="training a classifier", unit="step") as bar:
        for epoch in range(epochs):
            for index in epoch_batches(len(images), batch_size, seed, epoch):
                x = jitter(images[index].float() / 255, generator)
                with autocast(device, precision):
                    loss = F.cross_entropy(net(x)[1], labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return net.eval()


@torch.inference_mode()
def accuracy(net: DigitClassifier, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of images (N, C, H, W) uint8 whose most likely class is the label."""
    logits = [net(batch.to(device).float() / 255)[1] for batch in images.split(500)]
    return (torch.cat(logits).argmax(1).cpu() == labels).float().mean().item()

"""Images -> feature vectors, by two networks behind one protocol.

`mnist` is the project's own classifier (`classifier.py` trains it): it sees which digit, and how
well formed. `inception` is the network of the published FID: it sees texture and edges.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import NUM_CLASSES, UserError
from utils.files import write_atomically

CLASSIFIER_PATH = Path(__file__).parents[1] / "checkpoints" / "pretrained" / "mnist_classifier.pth"
CLASSIFIER_SHA256 = "0c199308cc1138fb943f3db0c9b78c684fd207e7a198041866b85f9fa65ecabd"
CACHE = Path("outputs") / "feature_cache"


class FeatureNetwork(Protocol):
    """uint8 (B, 1, H, W) -> float32 (B, dim) on the CPU.

    `version` tells the weights and `batch_size` how many images at a time are fastest.
    """

    name: str
    dim: int
    version: str
    batch_size: int

    def __call__(self, images: Tensor) -> Tensor: ...


class MNISTClassifier(nn.Module):
    """A small convolutional classifier of 28x28 digits; its last hidden layer is the features."""

    dim = 128

    def __init__(self):
        super().__init__()

        def block(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, 24), *block(24, 24), nn.MaxPool2d(2),  # 14x14
            *block(24, 48), *block(48, 48), nn.MaxPool2d(2),  # 7x7
            *block(48, self.dim), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(self.dim, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, 28, 28) in [0, 1] -> features (B, 128) >= 0 and logits (B, 10)."""
        features = self.body(x)
        return features, self.head(features)


def load_classifier(device="cpu") -> MNISTClassifier:
    """The shipped classifier. Raises UserError if its file is missing or another one."""
    try:
        digest = hashlib.sha256(CLASSIFIER_PATH.read_bytes()).hexdigest()
    except OSError:
        raise UserError(f"{CLASSIFIER_PATH}: missing; restore it with git checkout") from None
    if digest != CLASSIFIER_SHA256:
        raise UserError(f"{CLASSIFIER_PATH}: damaged, its SHA-256 is {digest[:12]}...")
    net = MNISTClassifier()
    net.load_state_dict(torch.load(CLASSIFIER_PATH, map_location="cpu", weights_only=True))
    return net.to(device, memory_format=torch.channels_last).eval()


class MNISTFeatures:
    """The classifier's last hidden layer, 128-d."""

    name, dim, batch_size = "mnist", MNISTClassifier.dim, 250

    def __init__(self, device="cpu"):
        self.net, self.device = load_classifier(device), device
        self.version = CLASSIFIER_SHA256[:12]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.device).float() / 255)[0].float().cpu()


class InceptionFeatures:
    """A layer of the FID's Inception network, by pytorch-fid: 64, 192, 768 or 2048-d."""

    def __init__(self, dims: int, device="cpu"):
        try:
            from pytorch_fid.inception import InceptionV3
        except ImportError:
            raise UserError("--features inception: needs the package pytorch-fid") from None
        try:
            net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
        except Exception as error:  # a failed or interrupted download, or a damaged file of one
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--features inception: cannot load its weights ({reason})") from None
        self.net = net.to(device, memory_format=torch.channels_last).eval()
        self.name, self.dim, self.device = f"inception-{dims}", dims, device
        # on a CPU the activations (299 x 299 pixels) of ten images fit its caches: 1.7 times faster
        self.batch_size = 10 if torch.device(device).type == "cpu" else 100
        digest = hashlib.sha256()
        for tensor in net.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.version = digest.hexdigest()[:12]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device).expand(-1, 3, -1, -1).float() / 255
        return F.adaptive_avg_pool2d(self.net(images)[0], 1).flatten(1).float().cpu()


def load_features(name: str, dims: int, device="cpu") -> FeatureNetwork:
    """The network for `--features` and `--dims`."""
    return MNISTFeatures(device) if name == "mnist" else InceptionFeatures(dims, device)


def extract(network: FeatureNetwork, batches: Iterable[Tensor], total: int, what: str) -> Tensor:
    """Features (N, dim) float32 of a stream of uint8 batches.

    Raises UserError when the network yields NaN or infinity: no score can be made of those.
    """
    parts = []
    with tqdm(total=total, desc=f"{network.name} features of {what}", unit="img") as bar:
        for batch in (part for big in batches for part in big.split(network.batch_size)):
            parts.append(network(batch))
            if not parts[-1].isfinite().all():
                raise UserError(
                    f"--features {network.name}: the network gives NaN or infinity,"
                    " so its weights are damaged or incomplete; no score was computed"
                )
            bar.update(len(batch))
    return torch.cat(parts)


def cached_features(network: FeatureNetwork, images: Tensor, what: str) -> Tensor:
    """Features of `images` (N, 1, H, W) uint8, kept on disk from one run to the next.

    The file's name holds the network's and the images' hashes and the file its own content's, so a
    stale or damaged one is never trusted but made anew.
    """
    key = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]
    path = CACHE / f"{network.name}_{network.version}_{len(images)}_{key}.features"
    size = 4 * len(images) * network.dim
    try:
        data = path.read_bytes()
        if len(data) == 32 + size and hashlib.sha256(data[32:]).digest() == data[:32]:
            features = np.frombuffer(data[32:], dtype=np.float32).reshape(-1, network.dim)
            return torch.from_numpy(features.copy())
    except OSError:
        pass
    features = extract(network, [images], len(images), what)
    data = features.numpy().tobytes()
    write_atomically(path, hashlib.sha256(data).digest() + data)
    return features

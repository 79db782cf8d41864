"""Images -> feature vectors, by two networks behind one protocol.

`mnist` is the project's own classifier (`python -m scoring.train_classifier` trains it): it sees
which digit it is and how well formed. `inception` is the network of the published FID: it sees
texture and edges.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from config import UserError
from scoring.classifier import CLASSIFIER_SHA256, DigitClassifier, load_classifier
from utils.files import write_atomically
from utils.provenance import source_hash

CACHE = Path("outputs") / "feature_cache"
CACHE_BLOCK = 1000  # images per file; an interrupted run keeps its finished blocks
CODE = ("scoring/features.py", "scoring/classifier.py")  # computes the features


class FeatureNetwork(Protocol):
    """uint8 (B, C, H, W) -> float32 (B, dim) on the CPU.

    `version` identifies the weights; `batch_size` is the fastest number of images at a time. `slow`
    is true if even the features of samples should be cached.
    """

    name: str
    dim: int
    version: str
    batch_size: int
    slow: bool

    def __call__(self, images: Tensor) -> Tensor: ...


class MNISTFeatures:
    """The classifier's last hidden layer, 128-d."""

    name, dim, batch_size, slow = "mnist", DigitClassifier.dim, 250, False

    def __init__(self, device="cpu"):
        self.net, self.device = load_classifier(device), device
        self.version = CLASSIFIER_SHA256[:12]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return self.net(images.to(self.device).float() / 255)[0].float().cpu()

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities (N, 10) of features (N, 128)."""
        return self.net.head(features.to(self.device)).softmax(dim=1).cpu()


class InceptionFeatures:
    """A layer of the FID's Inception network, from pytorch-fid: 64, 192, 768 or 2048-d."""

    def __init__(self, dims: int, device="cpu"):
        try:
            from pytorch_fid.inception import InceptionV3
        except ImportError:
            raise UserError("--features inception: needs the package pytorch-fid") from None
        try:
            net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
        except Exception as error:  # a failed or interrupted download, or a damaged file
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--features inception: cannot load its weights ({reason})") from None
        self.net = net.to(device, memory_format=torch.channels_last).eval()
        self.name, self.dim, self.device = f"inception-{dims}", dims, device
        self.slow = torch.device(device).type == "cpu"  # 10,000 images take ten minutes
        # there, the activations (299 x 299 pixels) of ten images fit in cache: 1.7 times faster
        self.batch_size = 10 if self.slow else 100
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


def check_features(name: str, shape: tuple[int, ...], source: str) -> None:
    """Raises UserError if the network cannot read images of `shape` (C, H, W) from `source`."""
    if name == MNISTFeatures.name and shape != DigitClassifier.shape:
        own, theirs = (" x ".join(map(str, size)) for size in (DigitClassifier.shape, shape))
        raise UserError(
            f"{source}: images of {theirs}; --features {name} reads {own}, use --features inception"
        )


def extract(network: FeatureNetwork, images: Tensor, what: str, cache: bool = False) -> Tensor:
    """Features (N, dim) float32 of images (N, C, H, W) uint8; a progress bar names `what`.

    With `cache`, blocks of features are cached on disk under a hash of their images. Use it for
    real images, which every run needs, and for samples if the network is slow: a run that was
    interrupted then continues.
    Raises UserError if the network returns NaN or infinity, which cannot be scored.
    """
    parts = []
    with tqdm(total=len(images), desc=f"{network.name} features of {what}", unit="img") as bar:
        for block in images.split(CACHE_BLOCK):
            parts.append(_cached(network, block, bar) if cache else _extract(network, block, bar))
    return torch.cat(parts)


def _extract(network: FeatureNetwork, images: Tensor, bar: tqdm) -> Tensor:
    parts = []
    for batch in images.split(network.batch_size):
        parts.append(network(batch))
        if not parts[-1].isfinite().all():
            raise UserError(
                f"--features {network.name}: the network returns NaN or infinity,"
                " so its weights are damaged or incomplete; no score was computed"
            )
        bar.update(len(batch))
    return torch.cat(parts)


def _cached(network: FeatureNetwork, images: Tensor, bar: tqdm) -> Tensor:
    """The features of a block of images, from a file if it was computed before.

    The file's name contains hashes of network, code and images, and the file a hash of its data, so
    stale or damaged files are never used.
    """
    shape = "x".join(map(str, images.shape))
    key = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]
    made = f"{network.name}_{network.version}_{source_hash(CODE)}"
    path = CACHE / f"{made}_{shape}_{key}.features"
    size = 4 * len(images) * network.dim
    try:
        data = path.read_bytes()
        if len(data) == 32 + size and hashlib.sha256(data[32:]).digest() == data[:32]:
            bar.update(len(images))
            features = np.frombuffer(data[32:], dtype=np.float32).reshape(-1, network.dim)
            return torch.from_numpy(features.copy())
    except OSError:
        pass
    features = _extract(network, images, bar)
    data = features.numpy().tobytes()
    with contextlib.suppress(UserError):  # a full disk must not cost the features
        write_atomically(path, hashlib.sha256(data).digest() + data)
    return features

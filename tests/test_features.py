import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from config import UserError
from scoring import classifier, features
from scoring.features import MNISTFeatures, extract, load_features
from scoring.metrics import fid
from utils.synthetic import synthetic_digits


class Counting:
    """The mean of each row of pixels, and how many images it was asked about."""

    name, dim, version, batch_size, slow = "counting", 28, "abc", 40, True

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.float().mean(dim=(1, 3))


@pytest.fixture
def images():
    return torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)


def test_the_shipped_classifier_reads_digits():
    network = MNISTFeatures()
    digits, labels = synthetic_digits(500, seed=9)
    assert network(digits).shape == (500, 128) and network(digits).dtype == torch.float32
    probabilities = network.probabilities(network(digits))
    assert probabilities.shape == (500, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(500))
    assert (probabilities.argmax(1) == labels).float().mean() > 0.8  # printed digits, never seen


def test_features_do_not_depend_on_the_batch(images):
    network = MNISTFeatures()
    torch.testing.assert_close(network(images)[:7], network(images[:7]), atol=1e-4, rtol=1e-4)


def test_a_changed_classifier_file_is_refused(own_folder, monkeypatch):
    copy = own_folder / "classifier.pth"
    data = bytearray(classifier.CLASSIFIER_PATH.read_bytes())
    data[5000] ^= 1
    copy.write_bytes(data)
    monkeypatch.setattr(classifier, "CLASSIFIER_PATH", copy)
    with pytest.raises(UserError, match="SHA-256"):
        MNISTFeatures()
    copy.unlink()
    with pytest.raises(UserError, match="missing"):
        MNISTFeatures()


def test_features_are_computed_once_and_read_back(images, monkeypatch):
    network = Counting()
    first = extract(network, images, "x", cache=True)
    assert network.seen == 60 and torch.equal(first, network(images))
    network.seen = 0
    assert torch.equal(extract(network, images, "x", cache=True), first) and network.seen == 0
    extract(network, images.flip(0), "x", cache=True)
    assert network.seen == 60
    monkeypatch.setattr(features, "source_hash", lambda files: "of other code")
    extract(network, images, "x", cache=True)
    assert network.seen == 120


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-4], lambda d: d[:50] + b"!" + d[51:], lambda d: b""]
)
def test_a_corrupt_cache_is_rebuilt(own_folder, images, damage):
    network = Counting()
    first = extract(network, images, "x", cache=True)
    (path,) = features.CACHE.glob("*.features")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    network.seen = 0
    assert torch.equal(extract(network, images, "x", cache=True), first) and network.seen == 60
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_nothing(images):
    features.CACHE.parent.mkdir()
    features.CACHE.write_text("a file where the folder should be")
    network = Counting()
    assert torch.equal(extract(network, images, "x", cache=True), network(images))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_gives_nan_is_refused(images, bad):
    network = Counting()
    network.__class__ = type("Bad", (Counting,), {"__call__": lambda self, x: x[:, 0, 0] * bad})
    for cache in (False, True):
        with pytest.raises(UserError, match="NaN"):
            extract(network, images, "x", cache)
    assert not features.CACHE.exists()


def test_inception_weights_that_cannot_be_had(monkeypatch):
    import pytorch_fid.inception

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="inception.*no network"):
        load_features("inception", 768)


def test_an_inception_layer(monkeypatch, images):
    """With random weights, as the real ones are a download."""
    import pytorch_fid.inception as module

    def random_weights():
        options = {"num_classes": 1008, "aux_logits": False, "weights": None}
        return module._inception_v3(**options, init_weights=False)

    monkeypatch.setattr(module, "fid_inception_v3", random_weights)
    network = load_features("inception", 64)
    assert network(images[:2]).shape == (2, 64) and network.name == "inception-64"
    assert network.version != load_features("inception", 64).version


def test_fid_equals_that_of_pytorch_fid(own_folder, monkeypatch):
    """The published implementation, reading PNGs, with the same (random) weights."""
    import pytorch_fid.fid_score
    import pytorch_fid.inception as module
    from scipy.linalg import sqrtm

    torch.manual_seed(0)
    options = {"num_classes": 1008, "aux_logits": False, "weights": None}
    net = module._inception_v3(**options, init_weights=False).eval()
    monkeypatch.setattr(module, "fid_inception_v3", lambda: copy.deepcopy(net))
    found = []
    for seed in (1, 2):
        digits = synthetic_digits(40, seed)[0]
        (own_folder / str(seed)).mkdir()
        for k, image in enumerate(digits):
            Image.fromarray(image[0].numpy()).save(own_folder / str(seed) / f"{k:03}.png")
        found.append(extract(load_features("inception", 64), digits, "x"))
    # the package calls sqrtm with an argument that SciPy 1.18 no longer has
    linalg = SimpleNamespace(sqrtm=lambda m, disp: (sqrtm(m), 0))
    monkeypatch.setattr(pytorch_fid.fid_score, "linalg", linalg)
    theirs = pytorch_fid.fid_score.calculate_fid_given_paths(
        ["1", "2"], 40, "cpu", 64, num_workers=0
    )
    assert fid(*found) == pytest.approx(theirs, rel=1e-3)

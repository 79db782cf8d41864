import hashlib
from pathlib import Path

import pytest
import torch

from scoring import evaluation
from scoring.classifier import DigitClassifier, accuracy, train_classifier
from tests.conftest import DIGITS
from utils.data_loader import DATASETS, Dataset, load_dataset
from utils.synthetic import synthetic_digits

CPU = torch.device("cpu")


def test_it_learns_to_read():
    net = train_classifier(*synthetic_digits(400, seed=1), CPU, epochs=12, batch_size=64)
    assert accuracy(net, *synthetic_digits(500, seed=2), CPU) > 0.7


def test_the_seed_decides_every_weight():
    digits = synthetic_digits(100, seed=1)

    def weights(seed):
        net = train_classifier(*digits, CPU, epochs=2, batch_size=50, seed=seed)
        return torch.cat([value.flatten().double() for value in net.state_dict().values()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_the_command_writes_the_classifier_that_it_tells_of(cli, monkeypatch):
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 200, "test": 100})
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["synthetic"])
    flags = ["--epochs", 2, "--batch_size", 50, "--device", "cpu", "--output", "out/net.pth"]
    status, stdout, stderr = cli("scoring.train_classifier", *flags)
    assert status == 0, stderr
    net = DigitClassifier()
    net.load_state_dict(torch.load("out/net.pth", weights_only=True))
    test = load_dataset("synthetic", "", "test")
    share = accuracy(net.eval(), test.images, test.labels, CPU)
    digest = hashlib.sha256(Path("out/net.pth").read_bytes()).hexdigest()
    assert stdout == f"test accuracy {share:.2%}\nout/net.pth: SHA-256 {digest}\n"


def test_what_a_classifier_has_learnt_is_found_again_and_by_its_content_alone(monkeypatch):
    images, labels = synthetic_digits(100, seed=1)
    test, trained = Dataset(*synthetic_digits(50, seed=2), DIGITS), []
    precision = "fp32"

    def counted(*given, **options):
        trained.append(options["seed"])
        return train_classifier(*given, **options)

    monkeypatch.setattr(evaluation, "TSTR_STEPS", 2)
    monkeypatch.setattr(evaluation, "train_classifier", counted)
    monkeypatch.setattr(evaluation, "arithmetic", lambda *_: precision)

    def learnt(labels, seed):
        return evaluation.learnt_accuracy(images, labels, test, seed, CPU)

    assert learnt(labels, 0) == learnt(labels.clone(), 0)
    learnt(labels, 1)
    learnt(labels.flip(0), 1)
    precision = "bf16"
    learnt(labels, 1)
    assert trained == [0, 1, 1, 1]


def test_bfloat16_rounds_the_products_and_nothing_else():
    digits = synthetic_digits(400, seed=1)
    options = {"epochs": 2, "batch_size": 50}
    exact, rounded = (
        train_classifier(*digits, CPU, **options, precision=name) for name in ("fp32", "bf16")
    )
    pairs = list(zip(exact.parameters(), rounded.parameters(), strict=True))
    assert all(weight.dtype == torch.float32 for _, weight in pairs)
    assert not torch.equal(*pairs[0])
    assert accuracy(rounded, *digits, CPU) == pytest.approx(accuracy(exact, *digits, CPU), abs=0.1)

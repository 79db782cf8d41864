"""A folder of anybody's small images, in colour or grey, from training to a score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from models.trained import load_trained
from scoring.classifier import DigitClassifier
from tests.processes import ranks
from utils.data_loader import load_dataset
from utils.image_folder import load_image_folder

TRAIN = ["--dataset", "folder", "--batch_size", 24, "--width", 8, "--timesteps", 20]
TRAIN += ["--device", "cpu", "--precision", "fp32", "--lr", 0.001]


def picture(k, height, width, colour):
    """A bright block whose place and colour change with k."""
    shape = (height, width, 3) if colour else (height, width)
    pixels = np.zeros(shape, np.uint8)
    row, column = k * 5 % (height - 6), k * 3 % (width - 6)
    pixels[row : row + 6, column : column + 6] = (255, 40 * (k % 5), k % 200) if colour else 255
    return Image.fromarray(pixels)


def make_folder(classes, *, count, height, width, colour=False, name="images", ending="png"):
    """A folder of `count` pictures for each of the classes; for none, of so many in all."""
    for number, label in enumerate(classes or [""]):
        folder = Path(name) / label
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(k + 7 * number, height, width, colour).save(folder / f"{k:03}.{ending}")
    return name


@pytest.fixture
def colour(own_folder):
    """80 RGB images of 32 x 32 in two classes."""
    return make_folder(["cats", "dogs"], count=40, height=32, width=32, colour=True)


@pytest.fixture
def oblong(own_folder):
    """80 grey images of 16 x 24, without classes."""
    return make_folder([], count=80, height=16, width=24)


@pytest.fixture
def random_inception(monkeypatch):
    """The network of the FID with random weights, as the real ones are a download."""
    import pytorch_fid.inception as module

    options = {"num_classes": 1008, "aux_logits": False, "weights": None, "init_weights": False}
    monkeypatch.setattr(module, "fid_inception_v3", lambda: module._inception_v3(**options))


def last_path(name):
    return sorted(Path(f"checkpoints/{name}").glob("*.pth"))[-1]


def last(name):
    return torch.load(last_path(name), weights_only=True)


@pytest.mark.parametrize(
    "kind, shape, labels",
    [("colour", (3, 32, 32), ["--labels", "cats,dogs"]), ("oblong", (1, 16, 24), [])],
)
def test_train_resume_sample_inpaint_and_score(
    cli, refuses, request, random_inception, kind, shape, labels
):
    folder = request.getfixturevalue(kind)
    train = [*TRAIN, "--data_dir", folder, "--experiment_name", "a", "--epochs"]
    assert cli("main", *train, 1)[0] == 0
    status, stdout, stderr = cli("main", *train, 2)
    assert status == 0 and "resuming" in stdout, stderr
    checkpoint = "checkpoints/a/model_epoch_1.pth"
    model = load_trained(checkpoint, "cpu")
    assert model.data.shape == shape and model.net.num_classes == len(labels)
    grid = Image.open("outputs/a/samples_epoch_1.png")
    assert grid.mode == ("RGB" if shape[0] == 3 else "L")
    assert grid.size == (2 * (8 * (shape[2] + 2) + 2), 2 * (8 * (shape[1] + 2) + 2))

    draw = ["--checkpoint", checkpoint, "--steps", 3, "--num_samples", 4]
    pictures = ["--npz", "a.npz", "--strip", "strip.png", "--animate", "film.gif"]
    assert cli("generate", *draw, *labels, *pictures)[0] == 0
    assert np.load("a.npz")["images"].shape == (4, *shape)
    assert Image.open("film.gif").n_frames == 3 and Image.open("strip.png").mode == grid.mode
    for mode in (["--interpolate", "1,2"], ["--reconstruct", "test"]):
        assert cli("generate", *draw, *mode)[0] == 0

    inpaint = ["--inpaint", "test", "--mask", "left", "--npz", "b.npz"]
    assert cli("generate", *draw, *inpaint)[0] == 0
    test = load_dataset("folder", folder, "test").images[:4].numpy()
    half = shape[2] // 2
    assert np.array_equal(np.load("b.npz")["images"][..., half:], test[..., half:])

    score = ["--path_to_model", checkpoint, "--num_samples", 12, "--steps", 3]
    refuses("validation", *score, words=("--path_to_model", "--features inception"))
    score += ["--features", "inception", "--dims", 64, "--memorization", "--json", "out.json"]
    status, _, stderr = cli("validation", *score)
    assert status == 0, stderr
    scores = json.loads(Path("out.json").read_text())
    assert scores["fid"] > 0 and scores["n_reference"] == 8
    assert scores["reference"] == "folder test set" and "classes" not in scores
    assert 0 <= scores["memorization_pixels_closer"] <= 1


@pytest.mark.parametrize("kind", ["colour", "oblong"])
def test_two_processes_make_the_steps_of_one(cli, request, kind):
    flags = [*TRAIN, "--data_dir", request.getfixturevalue(kind), "--epochs", 1]
    flags += ["--sample_every", 0]
    assert cli("main", *flags, "--experiment_name", "one")[0] == 0
    ranks(2, "main", *flags, "--experiment_name", "two")
    one, two = last("one"), last("two")
    assert one["step"] == two["step"] == 3
    for key, weight in one["ema"].items():
        torch.testing.assert_close(two["ema"][key], weight, atol=2e-5, rtol=1e-4, msg=key)


def test_classes_are_the_subfolders_by_name(colour):
    train, test = (load_dataset("folder", colour, split) for split in ("train", "test"))
    assert train.info.class_names == ("cats", "dogs") and len(train.images) == 72
    assert len(test.images) == 8
    assert torch.cat([train.labels, test.labels]).bincount().tolist() == [40, 40]
    again = load_dataset("folder", colour, "test")
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)
    assert sum(train.info.label_shares) == pytest.approx(1)


def test_train_and_test_are_apart_and_together_everything(oblong):
    images, labels, names = load_image_folder(oblong, "train", None)
    test, _, _ = load_image_folder(oblong, "test", None)
    assert names == () and not labels.any()
    every = torch.stack(
        [torch.tensor(np.array(picture(k, 16, 24, False)))[None] for k in range(80)]
    )
    together = sorted(x.numpy().tobytes() for x in torch.cat([images, test]))
    assert together == sorted(x.numpy().tobytes() for x in every)
    assert len(test) == 8


def test_a_folder_of_test_images_leaves_all_others_for_training(refuses, colour):
    make_folder(["cats", "dogs"], count=3, height=32, width=32, colour=True, name="test")
    train = load_dataset("folder", colour, "train", "test")
    test = load_dataset("folder", colour, "test", "test")
    assert len(train.images) == 80 and len(test.images) == 6
    held_out = load_dataset("folder", colour, "test", "test", held_out=True)
    assert len(held_out.images) == 13 and len(held_out.labels.unique()) == 2  # of both classes
    make_folder(["cats"], count=3, height=32, width=32, colour=True, name="other")
    with pytest.raises(Exception, match="--test_dir other: .* in 1 classes"):
        load_dataset("folder", colour, "test", "other")
    words = ("--test_dir test", "--dataset folder")
    refuses("main", "--dataset", "synthetic", "--test_dir", "test", words=words)


def test_a_folder_that_cannot_be_looked_at(refuses):
    for flag in ("--data_dir", "--test_dir"):
        long = ["--data_dir", make_folder([], count=20, height=16, width=16)]
        long += [flag, "x" * 300]
        refuses("main", *TRAIN, *long, words=(f"{flag} xxx",))


def test_hidden_folders_are_no_classes(colour):
    for name in (".thumbnails", "@eaDir"):
        make_folder([name], count=3, height=8, width=8)
    assert load_dataset("folder", colour, "train").info.class_names == ("cats", "dogs")


def test_a_model_is_not_scored_on_data_of_other_classes(cli, refuses, own_folder):
    make_folder(["cats", "dogs"], count=40, height=28, width=28)
    train = [*TRAIN, "--experiment_name", "a", "--epochs", 1]
    assert cli("main", *train, "--data_dir", "images")[0] == 0
    model = ["--path_to_model", last_path("a"), "--num_samples", 12]
    Path("images/dogs").rename("images/wolves")
    words = ("--data_dir images", "(cats, wolves)", "(cats, dogs)")
    for more in ([], ["--likelihood"], ["--tstr"], ["--reference_images", "images", "--tstr"]):
        refuses("validation", *model, *more, words=words)
    generate = ["--checkpoint", model[1], "--inpaint", "test", "--mask", "left"]
    refuses("generate", *generate, words=words)


def test_images_of_others_are_compared_by_the_classes_of_a_folder(cli, refuses, monkeypatch):
    make_folder(["cats", "dogs"], count=40, height=28, width=28)
    learnt = []

    def quickly(images, labels, device, epochs, num_classes, seed, precision):
        learnt.append(num_classes)
        return DigitClassifier().eval()

    monkeypatch.setattr("scoring.evaluation.train_classifier", quickly)
    images, labels = load_dataset("folder", "images", "train").images.numpy(), np.arange(72) % 2
    np.savez("told.npz", images=images, labels=labels)
    flags = ["--images", "told.npz", "--dataset", "folder", "--data_dir", "images", "--tstr"]
    status, _, stderr = cli("validation", *flags)
    assert status == 0 and learnt == [2] * 6, stderr
    np.savez("told.npz", images=images, labels=labels + 1)
    refuses("validation", *flags, words=("--images told.npz", "labels up to 2", "2 classes"))


def test_jpegs_are_read_too(own_folder):
    make_folder(["a"], count=12, height=16, width=16, ending="jpg")
    assert load_dataset("folder", "images", "train").images.shape == (11, 1, 16, 16)
    make_folder([], count=1, height=16, width=16, name="single")
    with pytest.raises(UserError, match="--data_dir single: contains too few images"):
        load_dataset("folder", "single", "train")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: None, ("--data_dir images", "no such folder")),
        (lambda: Path("images").mkdir(), ("--data_dir images", "without pictures")),
        (lambda: make_folder([], count=3, height=18, width=16), ("18 x 16", "multiples of 4")),
        (lambda: make_folder([], count=3, height=68, width=16), ("68 x 16", "at most 64")),
        (
            lambda: [
                make_folder([c], count=2, height=h, width=16) for c, h in (("a", 16), ("b", 20))
            ],
            ("--data_dir images", "b contains grey images of 20 x 16"),
        ),
        (
            lambda: [make_folder(c, count=2, height=16, width=16) for c in ("", "a")],
            ("--data_dir images", "beside the subfolders a"),
        ),
    ],
)
def test_folders_that_are_no_data_set_are_refused(refuses, own_folder, make, words):
    make()
    refuses("main", *TRAIN, "--data_dir", "images", words=words)


@pytest.mark.parametrize(
    "count, size, words",
    [
        (80, (16, 16), ("--data_dir other", "(1, 16, 16)", "(1, 16, 24)")),
        (160, (16, 24), ("--data_dir other", "144 training images", "72")),
    ],
)
def test_resuming_with_other_images_is_an_error(cli, refuses, oblong, count, size, words):
    train = [*TRAIN, "--experiment_name", "a", "--epochs"]
    assert cli("main", *train, 1, "--data_dir", oblong)[0] == 0
    make_folder([], count=count, height=size[0], width=size[1], name="other")
    refuses("main", *train, 2, "--data_dir", "other", words=words)

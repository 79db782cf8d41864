"""What `generate.py` does besides plain samples: classes, editing, films; and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from config import GUIDANCE, TrainConfig
from models import build_model
from sampling.requests import slerp
from tests.conftest import DIGITS, ROOT, save_model
from utils.synthetic import synthetic_digits
from utils.visualization import make_grid

SHIPPED = ROOT / "checkpoints" / "pretrained" / "unet.pth"


@pytest.fixture
def lively(own_folder):
    """The path of a tiny model whose random weights answer to image, timestep and label."""
    cfg = TrainConfig(width=8, timesteps=20, dataset="synthetic")
    torch.manual_seed(1)
    net = build_model(cfg, DIGITS)
    for p in net.parameters():
        if p.ndim >= 2 and not p.any():  # what starts at zero
            torch.nn.init.normal_(p, std=0.1)
    path = own_folder / "lively.pth"
    save_model(path, cfg, net.state_dict())
    return path


@pytest.fixture
def draw(cli, lively):
    """draw("--label", 3) -> the images (N, 1, 28, 28), uint8, that generate.py drew."""

    def call(*flags):
        command = ["--checkpoint", lively, "--steps", 4, "--npz", "drawn.npz", *flags]
        status, _, stderr = cli("generate", *command)
        assert status == 0, stderr
        return np.load("drawn.npz")["images"]

    return call


@pytest.fixture
def picture(own_folder):
    """The path of a PNG of one digit, and its pixels (28, 28)."""
    pixels = synthetic_digits(1, seed=5)[0][0, 0].numpy()
    Image.fromarray(pixels).save("digit.png")
    return "digit.png", pixels


@pytest.mark.parametrize(
    "count, columns, channels", [(7, 3, 1), (4, None, 3), (3, 3, 1), (2, 9, 3)]
)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_grid_is_that_of_torchvision(count, columns, channels, padding):
    images = torch.randint(256, (count, channels, 5, 6), dtype=torch.uint8)
    grid = make_grid(images, columns, padding)
    columns = columns or 2
    theirs = torchvision.utils.make_grid(images, nrow=columns, padding=padding)[:channels]
    assert torch.equal(grid, theirs)


def test_classes_in_three_ways(draw):
    number = draw("--digits", "3707")
    with Image.open("outputs/samples.png") as shown:
        assert shown.size == (4 * 28 * 2, 28 * 2)  # one row that reads as the number
    assert np.array_equal(number, draw("--labels", "3,7,0,7", "--num_samples", 4))
    in_turn = draw("--labels", "3,7", "--num_samples", 4)
    assert np.array_equal(in_turn[:2], number[:2])
    alone = draw("--label", 3, "--num_samples", 3).astype(int)  # rounding depends on the batch
    assert np.abs(in_turn[[0, 2]] - alone[[0, 2]]).max() <= 1
    assert not np.array_equal(in_turn[2], number[2])  # a 3 and a 0 of the same noise
    assert len(draw("--digits", "0")) == 1


@pytest.mark.parametrize("half", ["left", "right", "top", "bottom"])
def test_the_known_half_comes_back_as_it_was(draw, picture, half):
    path, pixels = picture
    images = draw("--inpaint", path, "--mask", half, "--num_samples", 3)
    known = {"left": np.s_[:, 14:], "right": np.s_[:, :14]}
    known |= {"top": np.s_[14:], "bottom": np.s_[:14]}
    missing = np.ones((28, 28), bool)
    missing[known[half]] = False
    assert (images[:, 0][:, ~missing] == pixels[~missing]).all()
    drawn = images[:, 0][:, missing].astype(int)
    assert np.abs(drawn[0] - drawn[1]).max() > 20  # another completion for each image number
    with Image.open("outputs/samples.png") as shown:
        assert shown.size == (2 * (3 * 30 + 2), 2 * (3 * 30 + 2))  # given, known, drawn


def test_a_mask_of_ones_own_and_a_set_of_pictures(draw):
    pixels = synthetic_digits(3, seed=5)[0].numpy()
    np.savez("digits.npz", images=pixels)
    mask = np.zeros((28, 28), np.uint8)
    mask[3:9, 20:] = 255
    Image.fromarray(mask).save("mask.png")
    images = draw("--inpaint", "digits.npz", "--mask", "mask.png", "--labels", "1,2")
    assert (images[:, 0, mask == 0] == pixels[:, 0, mask == 0]).all()
    assert (images[:, 0, mask > 0] != pixels[:, 0, mask > 0]).any()
    assert len(draw("--inpaint", "test", "--mask", "mask.png", "--num_samples", 2)) == 2


def test_interpolation_begins_and_ends_at_the_seeds(draw):
    row = draw("--interpolate", "3,4", "--num_samples", 5)
    for image, seed in ((row[0], 3), (row[-1], 4)):
        alone = draw("--seed", seed, "--num_samples", 1, "--guidance", 0, "--sampler", "unipc")[0]
        assert np.abs(image.astype(int) - alone).max() <= 1
    steps = np.abs(np.diff(row.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0).all()
    labelled = draw("--interpolate", "3,4", "--num_samples", 5, "--label", 2)
    assert not np.array_equal(labelled, row)


def test_slerp_keeps_the_length():
    a, b = torch.randn(2, 1, 1, 28, 28)
    row = slerp(a, b, 5)
    torch.testing.assert_close(row[0], a[0])
    torch.testing.assert_close(row[-1], b[0])
    lengths = row.flatten(1).norm(dim=1)
    assert lengths.min() > 0.98 * min(a.norm(), b.norm())
    torch.testing.assert_close(slerp(a, a, 3)[1], a[0])  # a seed and itself


def test_encoding_and_drawing_again(cli):
    """Digits of the shipped U-Net, encoded into noise, come back from it."""
    model = ["--checkpoint", SHIPPED, "--num_samples", 4]
    assert cli("generate", *model, "--npz", "first.npz")[0] == 0
    again = ["--reconstruct", "first.npz", "--npz", "again.npz"]
    status, stdout, stderr = cli("generate", *model, *again, "--sampler", "heun", "--steps", 40)
    assert status == 0, stderr
    first, second = (np.load(f"{name}.npz")["images"].astype(float) for name in ("first", "again"))
    error = np.sqrt(((first - second) ** 2).mean())
    assert f"{error:.1f} grey levels" in stdout
    assert error < 3
    assert np.sqrt(((first - second[[1, 2, 3, 0]]) ** 2).mean()) > 40  # another digit is far off


def test_animation(draw):
    draw("--num_samples", 5, "--animate", "film.gif", "--strip", "strip.png")
    with Image.open("film.gif") as film:
        assert film.n_frames == 4
        durations = []
        for k in range(film.n_frames):
            film.seek(k)
            durations.append(film.info["duration"])
        assert durations == [100, 100, 100, 2000]  # held on the last frame
        assert film.info["loop"] == 0
        last = np.asarray(film.convert("L"))
    grid = np.asarray(Image.open("outputs/samples.png"))
    assert np.abs(last[:, -grid.shape[1] :].astype(int) - grid).max() <= 1
    assert Image.open("strip.png").size == (2 * (4 * 30 + 2), 2 * (5 * 30 + 2))


@pytest.mark.parametrize("classes", [[], ["--label", 3]])
def test_images_with_labels_are_guided_by_default(draw, classes):
    flags = [*classes, "--num_samples", 4, "--guided_from", 0, "--guided_to", 1e9]  # at 4 steps too
    assert np.array_equal(draw(*flags), draw(*flags, "--guidance", GUIDANCE))
    assert not np.array_equal(draw(*flags), draw(*flags, "--guidance", 1))


def test_noise_of_a_sampler(draw):
    still = draw("--num_samples", 2, "--sampler", "ddim")
    assert np.array_equal(still, draw("--num_samples", 2, "--sampler", "ddim", "--eta", 0))
    noisy = draw("--num_samples", 2, "--sampler", "ddim", "--eta", 1)
    assert np.array_equal(noisy, draw("--num_samples", 2, "--sampler", "ddpm"))
    assert not np.array_equal(noisy, still)
    still = draw("--num_samples", 2, "--sampler", "dpmpp_2m")
    assert not np.array_equal(still, draw("--num_samples", 2))
    assert np.array_equal(still, draw("--num_samples", 2, "--eta", 0))
    still = draw("--num_samples", 2, "--sampler", "heun")
    assert not np.array_equal(still, draw("--num_samples", 2, "--sampler", "heun", "--churn", 2))


def small_png(name: str, size: int = 20) -> str:
    Image.fromarray(np.zeros((size, size), np.uint8)).save(name)
    return name


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--digits", "12a"], ("--digits 12a", "classes among 0, 1, 2")),
        (["--digits", ""], ("--digits", "empty")),
        (["--output", "x.jpg"], ("--output x.jpg", ".png")),
        (["--animate", "film.mp4"], ("--animate film.mp4", ".gif")),
        (["--inpaint", "", "--mask", "left"], ("--inpaint", "empty")),
        (["--interpolate", ""], ("--interpolate", "empty")),
        (["--labels", "1,10"], ("--labels 1,10", "classes among 0, 1, 2")),
        (["--labels", "1,"], ("--labels 1,", "classes among 0, 1, 2")),
        (["--label", "1", "--digits", "2"], ("--label", "--digits", "only one")),
        (["--digits", "2", "--interpolate", "1,2"], ("--digits", "--interpolate", "only one")),
        (["--eta", "1.5", "--sampler", "ddim"], ("--eta 1.5", "<= 1")),
        (["--eta", "0.5", "--sampler", "unipc"], ("--eta 0.5", "--sampler ddim or dpmpp_2m_sde")),
        (["--churn", "5"], ("--churn 5", "--sampler heun")),
        (["--interpolate", "3"], ("--interpolate 3", "two seeds")),
        (["--interpolate", "a,b"], ("--interpolate a,b", "two seeds")),
        (["--interpolate", "1,2", "--sampler", "ddpm"], ("--sampler ddpm", "noise of its own")),
        (["--interpolate", "1,2", "--guidance", "2"], ("--guidance 2", "must be 1")),
        (["--inpaint", "28.png"], ("--inpaint", "--mask")),
        (["--mask", "left"], ("--inpaint", "--mask")),
        (["--inpaint", "none.png", "--mask", "left"], ("--inpaint none.png", "no such file")),
        (["--inpaint", "text.png", "--mask", "left"], ("--inpaint text.png", "text file")),
        (["--inpaint", "20.png", "--mask", "left"], ("--inpaint 20.png", "28 x 28")),
        (["--inpaint", "28.png", "--mask", "20.png"], ("--mask 20.png", "28 x 28")),
        (["--inpaint", "28.png", "--mask", "middle"], ("--mask middle", "left, right")),
        (["--inpaint", "28.png", "--mask", "none.png"], ("--mask none.png", "no such file")),
        (
            ["--inpaint", "28.png", "--mask", "top", "--sampler", "heun"],
            ("--sampler heun", "RePaint"),
        ),
        (["--inpaint", "28.png", "--mask", "top", "--eta", "0.5"], ("--eta 0.5", "only --sampler")),
        (["--reconstruct", "20.png"], ("--reconstruct 20.png", "28 x 28")),
        (["--reconstruct", "28.png", "--sampler", "ddpm"], ("--sampler ddpm",)),
        (["--reconstruct", "28.png", "--steps", "1"], ("--steps 1", "at least 2")),
        (["--output", "x.png", "--animate", "/dev/null/x.gif"], ("/dev/null", "cannot be written")),
    ],
)
def test_bad_flags(refuses, own_folder, lively, flags, words):
    small_png("20.png", 20)
    small_png("28.png", 28)
    Path("text.png").write_text("hello")
    before = sorted(own_folder.iterdir())
    refuses("generate", "--checkpoint", lively, *flags, words=words)
    assert sorted(own_folder.iterdir()) == before


@pytest.mark.parametrize("flags", [["--label", "3"], ["--labels", "3"], ["--digits", "3"]])
def test_an_unconditional_model_takes_no_classes(refuses, tiny_checkpoint, flags):
    path = tiny_checkpoint(class_conditional=False)
    refuses("generate", "--checkpoint", path, *flags, words=(" ".join(flags), "unconditional"))

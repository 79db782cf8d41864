"""Every script from end to end, through its command line, on a tiny data set."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import figure_text
from config import FEW_STEP_SAMPLER, GUIDANCE, SamplingConfig, TrainConfig
from models.trained import load_trained
from sampling.draw import count_evaluated, labels_for, resolve, sample_images
from sampling.samplers import SAMPLERS
from scoring.classifier import DigitClassifier
from scoring.features import MNISTFeatures
from tests.conftest import DIGITS, ROOT, TINY, same, shell
from utils.data_loader import DATASETS, load_dataset
from utils.synthetic import synthetic_digits


def scores_in(folder, pattern="scores_*.json"):
    """The content of the one score file there; its figure lies beside it."""
    (path,) = Path(folder).glob(pattern)
    assert path.with_suffix(".png").exists()
    return json.loads(path.read_text())


@pytest.fixture
def small_synthetic(monkeypatch):
    """2,000 training and 500 test images instead of 20,000 and 10,000."""
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 2000, "test": 500})


@pytest.mark.parametrize("model_type", ["unet", "cnn", "resnet"])
def test_train_generate_validate(cli, own_folder, model_type):
    flags = ["--model_type", model_type, "--epochs", 2, "--sample_every", 1]
    status, stdout, stderr = cli("main", *TINY, *flags)
    name = f"diffusion_model_{model_type}_synthetic_2epochs_20timesteps_0.004lr"
    checkpoint = Path("checkpoints") / name / "model_epoch_1.pth"
    assert status == 0 and str(checkpoint) in stdout and "left" in stderr
    assert checkpoint.exists() and checkpoint.with_name("model_epoch_0.pth").exists()
    outputs = {p.name for p in (Path("outputs") / name).iterdir()}
    assert outputs == {"loss.png", "run.json", "samples_epoch_0.png", "samples_epoch_1.png"}
    assert Image.open(Path("outputs") / name / "loss.png").size[0] > 400
    assert list((Path("runs") / name).glob("events*"))

    flags = ["--num_samples", 16, "--npz", "a.npz", "--strip", "strip.png", "--steps", 5]
    status, stdout, _ = cli("generate", "--checkpoint", checkpoint, *flags)
    assert status == 0 and "outputs/samples.png" in stdout
    images = np.load("a.npz")["images"]
    assert images.shape == (16, 1, 28, 28) and images.dtype == np.uint8
    grid = np.asarray(Image.open("outputs/samples.png"))[::2, ::2]
    assert (grid[2:30, 2:30] == images[0, 0]).all() and (grid[32:60, 2:30] == images[4, 0]).all()
    assert Image.open("strip.png").size == (2 * (5 * 30 + 2), 2 * (8 * 30 + 2))

    drawn = Path("outputs/samples.png").read_bytes()  # the folder stands for its newest checkpoint
    assert cli("generate", "--checkpoint", checkpoint.parent, *flags)[0] == 0
    assert Path("outputs/samples.png").read_bytes() == drawn

    scored = ["--path_to_model", checkpoint.parent, "--experiment_name", name, "--num_samples", 100]
    np.savez("real.npz", images=synthetic_digits(300, seed=5)[0].numpy())
    scored += ["--model_type", model_type, "--reference_images", "real.npz"]
    status, stdout, _ = cli("validation", *scored)
    assert status == 0, stdout
    scores = scores_in(Path("outputs") / name, "scores_model_epoch_1_mnist_100_*.json")
    assert scores["n"] == 100 and scores["features"] == "mnist"
    assert scores["fid"] > scores["fid_floor"] > 0 and scores["kid"] > 5 * scores["kid_spread"]
    assert scores["sampler"] == "dpmpp_2m_sde" and scores["guidance"] == GUIDANCE
    assert scores["steps"] == 13 and scores["network_calls"] == 16
    other = {"unet": "cnn", "cnn": "resnet", "resnet": "unet"}[model_type]
    status, _, stderr = cli("validation", *scored, "--model_type", other)
    assert status == 2 and f"--model_type {other}" in stderr and f"holds a {model_type}" in stderr


def test_resume_in_the_middle_of_an_epoch_is_bitwise_too(cli, monkeypatch):
    command = [*TINY, "--train_size", 500, "--epochs", 1, "--device", "cpu"]
    assert cli("main", *command, "--experiment_name", "whole")[0] == 0

    def interrupt(run, *others):
        if run.step == 4:
            run.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.LOG_EVERY", 1)
        patch.setattr("training.loop.report", interrupt)
        assert cli("main", *command, "--experiment_name", "cut")[0] == 130
    assert "step 4" in cli("main", *command, "--experiment_name", "cut")[1]
    one, other = (
        torch.load(f"checkpoints/{name}/model_epoch_0.pth", weights_only=True)
        for name in ("whole", "cut")
    )
    for key in ("network", "ema", "optimizers", "generator", "step"):
        assert same(one[key], other[key]), key


def test_resuming_with_another_architecture_is_an_error(cli, refuses):
    base = [*TINY, "--epochs", 1, "--experiment_name", "a"]
    assert cli("main", *base)[0] == 0
    refuses("main", *base, "--model_type", "cnn", words=("--model_type cnn", "unet"))
    refuses("main", *base, "--timesteps", 30, words=("--timesteps 30", "20"))
    status, stdout, _ = cli("main", *base)
    assert status == 0 and "resuming" in stdout  # nothing was harmed; and nothing is left to do
    assert cli("main", *base, "--epochs", 2)[0] == 0
    assert Path("checkpoints/a/model_epoch_1.pth").exists()


def test_a_time_budget_anneals_to_zero_and_ends(cli):
    budget = ["--max_minutes", 0.05, "--epochs", 10_000, "--sample_every", 0]
    assert cli("main", *TINY, *budget, "--experiment_name", "b", "--keep", 1)[0] == 0
    (path,) = Path("checkpoints/b").iterdir()
    state = torch.load(path, weights_only=True)
    assert 0.05 <= state["minutes"] < 0.2
    assert state["optimizers"][0]["param_groups"][0]["lr"] < 0.001


def test_conditional_training_and_labels(cli, refuses, monkeypatch, small_synthetic):
    name = ["--experiment_name", "c"]
    assert cli("main", *TINY, "--epochs", 1, *name)[0] == 0
    draw = ["--checkpoint", "checkpoints/c/model_epoch_0.pth", "--num_samples", 4, "--steps", 3]
    for flags in ([], ["--label", 7], ["--label", 7, "--guidance", 3], ["--guidance", 0]):
        assert cli("generate", *draw, *flags)[0] == 0
    learnt = []

    def quickly(images, labels, device, epochs, num_classes, seed, precision):
        learnt.append((images, labels))
        return DigitClassifier().eval()

    monkeypatch.setattr("scoring.evaluation.train_classifier", quickly)
    score = ["--num_samples", 100, "--steps", 3, "--guidance", 2, "--tstr", "--json", "out.json"]
    score += ["--guided_from", 0, "--guided_to", 1e9]
    status, stdout, stderr = cli("validation", *name, *score)
    assert status == 0 and "agrees" in stdout, stderr
    scores = json.loads(Path("out.json").read_text())
    assert scores["network_calls"] == 6  # both halves of guidance count
    confusion = torch.tensor(scores["confusion"])
    assert scores["agreement"] == pytest.approx(confusion.trace().item() / 100)
    assert 0 <= scores["tstr_accuracy"] <= 1 and 0 <= scores["tstr_accuracy_real"] <= 1
    assert len(learnt) == 6  # of three seeds each
    (samples, asked), (real, labels) = (
        learnt[0],
        learnt[3],
    )  # both with the labels that belong to them
    assert samples.shape == real.shape
    model = load_trained("checkpoints/c/model_epoch_0.pth", "cpu")
    assert asked.tolist() == labels_for(model, 100, seed=0).tolist()
    assert asked.bincount(minlength=10).tolist() == confusion.sum(1).tolist()
    read = MNISTFeatures()
    digits = read.probabilities(read(real)).argmax(1)
    assert (digits == labels).float().mean() > 0.8
    refuses("generate", *draw, "--label", 10, words=("--label 10", "classes among 0, 1, 2"))


def test_labels_are_drawn_as_often_as_in_the_data(cli, tiny_checkpoint):
    assert cli("main", *TINY, "--train_size", 250, "--epochs", 1, "--experiment_name", "c")[0] == 0
    model = load_trained("checkpoints/c/model_epoch_0.pth", "cpu")
    shares = load_dataset("synthetic", "", "train").labels[:250].bincount(minlength=10) / 250
    assert shares.std() > 0.01  # few images are uneven ones
    labels = labels_for(model, 20_000, seed=3)
    # more than four standard deviations of a share of 20,000 draws
    torch.testing.assert_close(labels.bincount(minlength=10) / 20_000, shares, atol=0.01, rtol=0)
    assert labels_for(model, 7, seed=3).tolist() == labels[:7].tolist()
    assert labels_for(model, 7, seed=4).tolist() != labels[:7].tolist()
    alone = load_trained(tiny_checkpoint(class_conditional=False), "cpu")
    assert labels_for(alone, 3, seed=3) is None


def test_an_unconditional_network_learns_no_labels(cli, refuses):
    name = ["--experiment_name", "u"]
    assert cli("main", *TINY, "--epochs", 1, "--no-class_conditional", *name)[0] == 0
    path = "checkpoints/u/model_epoch_0.pth"
    assert cli("generate", "--checkpoint", path, "--steps", 3)[0] == 0
    refuses("generate", "--checkpoint", path, "--label", 3, words=("--label 3", "unconditional"))


def test_an_untrained_checkpoint_and_every_sampler(cli, tiny_checkpoint):
    path = tiny_checkpoint()
    for sampler in SAMPLERS:
        command = ["--checkpoint", path, "--sampler", sampler, "--num_samples", 2]
        assert cli("generate", *command, "--output", f"{sampler}.png")[0] == 0
        assert Path(f"{sampler}.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_samples", "-3"], ("--num_samples -3", ">= 1")),
        (["--steps", "0"], ("--steps 0", ">= 1")),
        (["--steps", "21"], ("--steps 21", "T = 20")),
        (["--sampler", "magic"], ("--sampler magic", "ddpm")),
        (["--label", "3"], ("--label 3", "unconditional")),
        (["--label", "-1"], ("--label -1",)),
        (["--seed", "9" * 400], ("--seed 999", "<= ")),
        (["--interpolate", "1," + "9" * 5000], ("--interpolate 1,999", "two seeds")),
        (["--guidance", "2"], ("--guidance 2", "unconditional")),
        (["--guidance", "nan"], ("--guidance nan",)),
        (["--guided_from", "20"], ("--guided_from 20", "--guided_to")),
        (["--output", "/dev/null/x.png"], ("/dev/null", "cannot be written")),
        (["--output", "."], ("--output .", ".png")),
        (["--output", "folder.png"], ("--output folder.png", "folder")),
        (["--checkpoint", "folder.png"], ("--checkpoint folder.png", "holds no checkpoint")),
        (["--npz", "/dev/null", "--strip", "./a.png", "--output", "a.png"], ("--strip ./a.png",)),
        (["--device", "tpu"], ("--device tpu", "cpu")),
    ],
)
def test_bad_flags_of_generate(refuses, own_folder, tiny_checkpoint, flags, words):
    path = tiny_checkpoint(class_conditional=False)
    Path("folder.png").mkdir()
    refuses("generate", "--checkpoint", path, *flags, words=words)
    assert {p.name for p in own_folder.iterdir()} == {path.name, "folder.png"}


def test_an_output_folder_that_cannot_be_made(refuses, own_folder):
    (own_folder / "checkpoints").write_text("in the way")
    refuses("main", *TINY, words=("output folder", "cannot be written"))
    assert [p.name for p in own_folder.iterdir()] == ["checkpoints"]


def test_a_device_that_is_not_there(refuses):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    refuses("main", *TINY, "--device", "cuda", words=("--device cuda", "cpu"))


def pngs(folder, images):
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k}.png")


def test_a_network_that_always_saw_labels_needs_one(refuses, tiny_checkpoint):
    path = tiny_checkpoint(label_dropout=0.0)
    refuses("generate", "--checkpoint", path, "--interpolate", "1,2", words=("give --label",))
    refuses("generate", "--checkpoint", path, "--guidance", 2, words=("--guidance 2", "must be 1"))


def test_what_needs_the_data_set_needs_images_of_its_shape(refuses, own_folder):
    """--reference_images may have any shape, but --memorization also reads the data set."""
    np.savez("a.npz", images=synthetic_digits(20, seed=5)[0].numpy())
    pngs(own_folder / "pics", np.zeros((20, 16, 16), dtype=np.uint8))
    flags = ["--images", "a.npz", "--reference_images", "a.npz", "--memorization"]
    flags += ["--dataset", "folder", "--data_dir", "pics"]
    refuses("validation", *flags, words=("--images a.npz", "16"))
    assert not list(Path().glob("outputs/*/*.json"))


def test_a_result_can_go_down_a_pipe(cli, own_folder):
    np.savez("a.npz", images=synthetic_digits(120, seed=5)[0].numpy())
    reader, writer = os.pipe()
    flags = ["--images", "a.npz", "--reference_images", "a.npz", "--json", f"/dev/fd/{writer}"]
    assert cli("validation", *flags)[0] == 0
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.load(pipe)["n"] == 120
    assert not list(own_folder.rglob("*.png"))


def test_images_of_others_are_scored_the_same_from_png_and_npz(cli, own_folder):
    images = synthetic_digits(120, seed=5)[0].numpy()
    pngs(own_folder / "png", images[:, 0])
    np.savez("same.npz", images=images)
    np.save("real.npy", synthetic_digits(200, seed=6)[0].numpy())
    found = []
    for path in ("png", "same.npz"):
        flags = ["--images", path, "--reference_images", "real.npy", "--json", "out.json"]
        assert cli("validation", *flags)[0] == 0
        found.append(json.loads(Path("out.json").read_text()))
    assert found[0]["fid"] == found[1]["fid"] and found[0]["n"] == 120
    assert found[0]["n_reference"] == 200 and found[0]["reference"] == "real.npy"


def test_the_synthetic_test_set_scores_at_its_floor(cli, monkeypatch):
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 4000, "test": 4000})
    # 1,000 of 4,000: classes as uneven as those of the random training images of the floor
    np.savez("test.npz", images=synthetic_digits(4000, seed=77)[0][:1000].numpy())
    flags = ["--dataset", "synthetic", "--floor_draws", 2]
    assert cli("validation", "--images", "test.npz", *flags)[0] == 0
    scores = scores_in("outputs/test", "scores_images_mnist_1000_*.json")
    assert scores["n_reference"] == 4000 and scores["n_floor"] == 1000
    assert scores["n_floor_draws"] == 2 and abs(scores["fid_distance"]) < 3
    assert 0.5 < scores["fid"] / scores["fid_floor"] < 2


def test_few_images_are_scored_with_a_warning(cli, small_synthetic):
    np.save("few.npy", synthetic_digits(120, seed=5)[0].numpy())
    flags = ["--images", "few.npy", "--dataset", "synthetic"]
    status, stdout, stderr = cli("validation", *flags)
    assert status == 0 and "warning: 120 images cannot fill a covariance of 128" in stderr
    scores = scores_in("outputs/few")
    assert f"real data itself scores {scores['fid_floor']:.3f}" in scores["warnings"][0]
    assert [row["class"] for row in scores["classes"]] == list(range(10))
    assert sum(row["n"] for row in scores["classes"]) == 120


def test_copies_of_training_images_are_found(cli, small_synthetic):
    train = load_dataset("synthetic", "", "train").images
    for name, images in (("copies", train[:200]), ("fresh", synthetic_digits(200, seed=5)[0])):
        np.save(f"{name}.npy", images.numpy())
        flags = ["--images", f"{name}.npy", "--dataset", "synthetic", "--memorization"]
        assert cli("validation", *flags)[0] == 0
        scores = scores_in(f"outputs/{name}")
        for space in ("pixels", "features"):
            closer = scores[f"memorization_{space}_closer"]
            assert closer == 1 if name == "copies" else 0.4 < closer < 0.6, (name, space)
        assert len(list(Path(f"outputs/{name}").glob("scores_*_memorization.png"))) == 1


def test_every_checkpoint_of_a_run_is_scored(cli, small_synthetic):
    run = ["--experiment_name", "all"]
    assert cli("main", *TINY, "--epochs", 4, "--keep", 4, *run)[0] == 0
    flags = ["--validate_all", "--num_samples", 100, "--steps", 3]
    status, stdout, stderr = cli("validation", *run, *flags)
    assert status == 0 and stdout.count("floor") == 4, stderr
    rows = scores_in("outputs/all", "scores_all_mnist_100_*.json")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    events = EventAccumulator("runs/all/validation").Reload()
    logged = events.Scalars("validation/fid_mnist")
    assert [event.step for event in logged] == [0, 1, 2, 3]
    assert logged[2].value == pytest.approx(rows[2]["fid"], rel=1e-6)


@pytest.fixture
def synthetic_mnist(monkeypatch, small_synthetic):
    """What asks for MNIST gets the small synthetic data set."""
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["synthetic"])


def one_network_is_shipped(monkeypatch):
    """Instead of three, of which one is fast enough for a test."""
    Path("shipped").mkdir()
    shutil.copy(ROOT / "checkpoints/pretrained/cnn.pth", "shipped")
    monkeypatch.setattr("benchmarks.common.PRETRAINED", Path("shipped"))


def test_the_tables_of_the_readme(cli, refuses, monkeypatch, synthetic_mnist):
    np.save("other.npy", synthetic_digits(600, seed=5)[0].numpy())
    flags = ["--features", "mnist", "--num_samples", 600]
    status, stdout, _ = cli("benchmarks", "floors", *flags)
    assert status == 0 and stdout.count("| mnist |") == 1 and "| 512 |" in stdout
    result = json.loads(Path("outputs/benchmark/floors.json").read_text())
    row = result["values"]["mnist"]["512"]
    assert figure_text(row["fid"]) in stdout and row["n"] == 512 and result["hardware"]["cpu"]
    status, stdout, _ = cli("benchmarks", "faults", *flags, "--other_images", "other.npy")
    rows = [line.split(" | ") for line in stdout.splitlines() if line.startswith("| mnist")]
    fids = {row[1]: float(row[2].split()[0]) for row in rows}
    assert list(fids)[0] == "nothing" and "other, n = 600" in fids
    assert all(fids[name] > 5 * fids["nothing"] for name in ("blurred", "8 of 10 classes"))
    assert Path("outputs/benchmark/faults.png").exists()
    refuses("benchmarks", "speed", words=("speed", "floors, faults"))

    one_network_is_shipped(monkeypatch)
    np.save("few.npy", synthetic_digits(40, seed=5)[0].numpy())
    flags = ["--features", "mnist", "--images", "other.npy,few.npy"]
    status, stdout, _ = cli("benchmarks", "compare", *flags, "--sizes", "30,100")
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line[:2] == "| "]
    table = {row[0]: row[1:] for row in rows}
    assert status == 0 and list(table)[2:] == ["real training images", "cnn", "other", "few"]
    minutes = load_trained("shipped/cnn.pth", "cpu").config.max_minutes
    assert table["cnn"][1:3] == [f"{minutes:g} min", "16"] and table["few"][-1] == "-"
    assert float(table["cnn"][0]) == pytest.approx(0.46, abs=0.01)
    distance = {name: float(row[-2].split()[0]) for name, row in list(table.items())[2:]}
    assert distance["cnn"] > distance["real training images"] and distance["few"] > 0
    refuses("benchmarks", "compare", "--sizes", "1", words=("--sizes 1", ">= 2"))
    for twice in ("other.npy,./other.npy", "cnn.npy"):
        shutil.copy("other.npy", "cnn.npy")
        refuses("benchmarks", "compare", "--images", twice, words=(f"--images {twice}", "name"))
    np.save("large.npy", np.zeros((40, 1, 32, 32), dtype=np.uint8))
    np.save("five.npy", np.zeros((5, 1, 28, 28), dtype=np.uint8))
    for command, flag in (("compare", "--images"), ("faults", "--other_images")):
        refuses("benchmarks", command, flag, "large.npy", words=(f"{flag} large.npy", "32 x 32"))
        refuses("benchmarks", command, flag, "five.npy", words=(f"{flag} five.npy", "at least 6"))
    refuses("benchmarks", "floors", "--seed", 2**64, words=("--seed", "<= 9.2"))


def test_benchmarks_score_a_random_part_of_a_file():
    from benchmarks.common import read_digits

    ranked = np.arange(200, dtype=np.uint8)[:, None, None, None] + np.zeros((28, 28), np.uint8)
    np.save("sorted.npy", ranked)
    part = read_digits(Path("sorted.npy"), "--images", 50, seed=0)
    assert len(part) == 50 and part.float().mean() == pytest.approx(100, abs=20)
    assert torch.equal(part[:20], read_digits(Path("sorted.npy"), "--images", 20, seed=0))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "loglinear"])
def test_calls_are_counted_as_the_network_will_be_called(tiny_checkpoint, schedule):
    from benchmarks.sampling import affordable, calls_of

    model = load_trained(tiny_checkpoint(schedule=schedule, timesteps=300), "cpu")
    assert (
        affordable(resolve(SamplingConfig(sampler="heun", guidance=1.0), model), model, 0) is None
    )
    for sampler in ("heun", "dpmpp_2m_sde"):
        asked = resolve(SamplingConfig(sampler=sampler, guidance=2.0), model)
        for most in (2, 5, 8):
            sampling = affordable(asked, model, most)
            sigmas = model.diffusion.schedule.sampling_sigmas(sampling.steps, sampling.spacing)
            evaluated = count_evaluated(model.net)
            list(sample_images(model, 1, sampling, labels=torch.zeros(1, dtype=torch.long)))
            assert sum(evaluated) == calls_of(sampling, sigmas) <= most
            more = dataclasses.replace(sampling, steps=sampling.steps + 1)
            sigmas = model.diffusion.schedule.sampling_sigmas(more.steps, more.spacing)
            assert calls_of(more, sigmas) > most


def test_samplers_and_guidance_get_the_calls_they_are_said_to(cli, monkeypatch, synthetic_mnist):
    from benchmarks import common
    from benchmarks import sampling as module

    plain, drawn = module.draw, {}

    def counted(model, count, sampling):
        evaluated = count_evaluated(model.net)
        images = plain(model, count, sampling)
        drawn[sampling.sampler, sampling.guidance] = sum(evaluated) / count
        return images

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", counted)
        flags = ["--checkpoint", ROOT / "checkpoints/pretrained/cnn.pth", "--num_samples", 40]
        status, stdout, stderr = cli("benchmarks", "samplers", *flags, "--calls", "8")
        assert status == 0 and stdout.count("| dpmpp_2m_sde, logsnr") == 2, stderr
        assert stdout.splitlines()[3].startswith("| real training images | ")
        unguided = {(name, 1.0) for name in SAMPLERS if name != FEW_STEP_SAMPLER}
        assert set(drawn) == unguided | {("dpmpp_2m_sde", GUIDANCE)}
        assert drawn.pop(("dpmpp_2m_sde", GUIDANCE)) == 7, drawn  # seven steps would make nine
        assert all(calls == 8 for calls in drawn.values()), drawn
        drawn.clear()
        again = cli("benchmarks", "samplers", *flags, "--calls", "8")[1]
        assert not drawn and again.splitlines()[:11] == stdout.splitlines()[:11]
        other = [*flags, "--sampler", "ddim", "--calls", "8"]
        cli("benchmarks", "samplers", *other, "--seed", 3)
        assert drawn.pop(("ddim", 1.0)) and not drawn  # another seed's images
        few = [*flags, "--sampler", FEW_STEP_SAMPLER, "--calls", "1", "--variety"]
        table = cli("benchmarks", "samplers", *few)[1].rpartition("closer, features |\n")[2]
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:4]]
        assert [row[:2] for row in rows] == [
            ["dpmpp_2m_sde", "16"],
            [FEW_STEP_SAMPLER, "1"],
            [FEW_STEP_SAMPLER, "2"],
        ]
        assert all(0 <= float(cell) <= 1 for row in rows for cell in row[-2:])
        few[1] = ROOT / "checkpoints/pretrained/unet_fewstep.pth"  # it has a sampler of its own
        table = cli("benchmarks", "samplers", *few)[1].rpartition("closer, features |\n")[2]
        assert f"| {FEW_STEP_SAMPLER} | 1 |" in table.splitlines()[1]
        drawn.clear()
        patch.setattr(common, "source_hash", lambda rooms: "of other code")
        cli("benchmarks", "samplers", *other)
        assert drawn.pop(("ddim", 1.0)) and not drawn

    status, stdout, _ = cli("benchmarks", "guidance", *flags, "--scales", "0,2", "--steps", 8)
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines()[3:7]]
    assert [row[:3] for row in rows] == [
        ["0", "all", "8"],
        ["2", "0.6 to 2", "10"],
        ["2", "2 to 12", "10"],
        ["2", "all", "16"],
    ]
    assert float(rows[0][3]) < 0.5 < float(rows[3][3])  # agreement with the labels


def test_what_guidance_cannot_be_measured_on(refuses, tiny_checkpoint, synthetic_mnist):
    refuses("benchmarks", "guidance", "--scales", "1,x", words=("--scales 1,x", "numbers"))
    flags = ["--num_samples", 40, "--inception", 50]
    refuses("benchmarks", "guidance", *flags, words=("--inception 50", "--num_samples"))
    path = tiny_checkpoint(class_conditional=False)
    words = (f"--checkpoint {path}", "unconditional")
    refuses("benchmarks", "guidance", "--checkpoint", path, words=words)
    data = dataclasses.replace(DIGITS, name="fashion_mnist", class_names=tuple("abcdefghij"))
    path = tiny_checkpoint("clothes.pth", data)
    for command, flag in (
        ("guidance", "--checkpoint"),
        ("samplers", "--checkpoint"),
        ("calibration", "--path_to_model"),
    ):
        words = (f"{flag} {path}", "fashion_mnist", "digits")
        sizes = ["--sizes", "100"] * (command == "calibration")
        refuses("benchmarks", command, flag, path, *sizes, words=words)


def test_time_to_quality(cli, refuses, monkeypatch, synthetic_mnist):
    flags = ["--max_minutes", 0.03, "--num_samples", 40, "--model_type", "cnn"]
    flags += ["--settings", "--batch_size 20 --width 8 --lr 0.02"]
    status, stdout, _ = cli("benchmarks", "train", *flags, "--seeds", 2)
    assert status == 0 and "± " in stdout and "# commit: " in stdout
    rows = [line.split(" | ") for line in stdout.splitlines() if line.startswith(("| 0", "| 1"))]
    first, second = (next(row for row in rows if row[0] == f"| {seed}") for seed in (0, 1))
    fids = [float(row[3].split()[0].replace(",", "")) for row in (first, second)]
    assert fids[0] != fids[1] and min(fids) > 0 and int(first[1]) > 1
    assert Path("outputs/benchmark/train_cnn.png").exists()
    goals = {"reached": fids[0] + 1, "missed": fids[0] / 2}
    said = {
        name: cli("benchmarks", "speedrun", *flags, "--seeds", 1, "--fid", goal)[1]
        for name, goal in goals.items()
    }
    assert "as measured before" in said["reached"] and "minutes, 1 seeds" in said["reached"]
    assert "1 of 1 seeds missed it" in said["missed"]
    monkeypatch.setattr("benchmarks.common.source_hash", lambda rooms: "of other code")
    assert "as measured before" not in cli("benchmarks", "speedrun", *flags, "--seeds", 1)[1]
    refuses("benchmarks", "train", "--settings", "--lr 7", words=("--lr 7", "<= 1"))
    for flag in ("--seed", "--teacher"):
        words = (f"--settings {flag}", "own")
        refuses("benchmarks", "train", "--settings", f"{flag} 7", words=words)
    for flag in ("--settings", "--sampling"):
        refuses("benchmarks", "train", flag, "--lr '1", words=(f"{flag} --lr '1", "quotation"))
    monkeypatch.setitem(
        DATASETS,
        "fashion_mnist",
        lambda *given: (
            torch.zeros(20, 1, 28, 28, dtype=torch.uint8),
            torch.zeros(20, dtype=torch.long),
            ("a",),
        ),
    )
    words = ("--settings --dataset fashion_mnist", "digits")
    refuses("benchmarks", "train", "--settings", "--dataset fashion_mnist", words=words)


def test_speeds(cli, monkeypatch):
    one_network_is_shipped(monkeypatch)
    status, stdout, _ = cli("benchmarks", "sample", "--num_samples", 2, "--rounds", 2)
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line[:2] == "| "]
    by_default, ancestral = rows[2:]
    assert status == 0 and by_default[:2] == ["cnn", "16"] and ancestral[:2] == ["cnn, ddpm", "300"]
    assert float(by_default[3]) == 1 and float(ancestral[3]) < 0.2
    status, stdout, _ = cli(
        "benchmarks",
        "train",
        "--profile",
        "--settings",
        "--width 16 --batch_size 32",
        "--device",
        "cpu",
    )
    share = re.search(r"(\d+)% of the best .* matrix product", stdout)
    assert status == 0 and 0 < int(share[1]) <= 100
    parts = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line[:2] == "| "]
    names = ["forward", "backward", "clip", "adamw", "muon", "ema", "the whole step"]
    assert [row[0] for row in parts[2:]] == names
    milliseconds = {row[0]: float(row[1]) for row in parts[2:]}
    assert min(milliseconds.values()) > 0


def test_speeds_by_graphs(refuses, tiny_checkpoint):
    """On a CPU nothing is recorded, but all is called; the command itself is for a GPU."""
    from benchmarks.gpu import forward_rate, training_rates

    refuses("benchmarks", "gpu", "--device", "cpu", words=("--device cpu", "cuda"))
    cpu, cfg = torch.device("cpu"), TrainConfig(width=8, batch_size=4)
    assert min(training_rates(cfg, cpu, times=1)) > 0
    for settings in ({}, {"class_conditional": False}):
        model = load_trained(tiny_checkpoint(**settings), cpu)
        assert forward_rate(model, SamplingConfig(batch_size=3), times=1) > 0


def test_the_feature_networks_are_timed_beside_pytorch_fid(cli, monkeypatch, synthetic_mnist):
    """On folders of pictures; another network and another program stand in for the two."""
    from benchmarks import ruler

    folders = []

    def other_program(*arguments):
        if arguments == ("--help",):
            return "usage", 1.0
        folders.extend(len(list(Path(folder).glob("*.png"))) for folder in arguments[:2])
        return "FID:  0.5", 3.0

    monkeypatch.setattr(ruler, "load_features", lambda name, dims, device: MNISTFeatures(device))
    monkeypatch.setattr(ruler, "pytorch_fid", other_program)
    status, stdout, stderr = cli("benchmarks", "features", "--num_samples", 40, "--device", "cpu")
    rows = [line.strip("| ").split(" | ") for line in stdout.splitlines() if line[:2] == "| "][2:]
    assert status == 0 and [row[0] for row in rows] == ["64", "192", "768"], stderr
    assert folders == [40] * 6 and len({row[1] for row in rows}) == 1  # one network, one distance
    assert float(rows[0][1]) > 0 and float(rows[0][2]) == 0.5
    assert {float(row[5]) for row in rows} == {40}  # 80 pictures in 3 s, of which 1 s is the start


def test_labels_of_others_are_read_too(cli, refuses, monkeypatch, small_synthetic):
    """An .npz with labels, as generate.py writes one, is scored by agreement and usefulness."""
    images, labels = synthetic_digits(200, seed=5)
    learnt = []

    def quickly(*given, **options):
        learnt.append(given)
        return DigitClassifier().eval()

    monkeypatch.setattr("scoring.evaluation.train_classifier", quickly)
    np.savez("told.npz", images=images.numpy(), labels=labels.numpy())
    flags = ["--images", "told.npz", "--dataset", "synthetic", "--tstr"]
    status, stdout, stderr = cli("validation", *flags)
    assert status == 0 and "agreement" in stdout, stderr
    assert scores_in("outputs/told")["agreement"] > 0.8
    assert torch.equal(learnt[0][0], images) and torch.equal(learnt[0][1], labels)
    np.savez("untold.npz", images=images.numpy())
    flags = ["--images", "untold.npz", "--dataset", "synthetic", "--tstr"]
    refuses("validation", *flags, words=("--tstr", "labels"))
    np.savez("from_one.npz", images=images.numpy(), labels=labels.numpy() + 1)
    flags = ["--images", "from_one.npz", "--dataset", "synthetic"]
    refuses("validation", *flags, words=("--images from_one.npz", "labels up to 10", "10 classes"))


def test_a_part_of_a_file_is_a_random_one(cli, small_synthetic):
    """A file sorted by class: its first images would be of one class only."""
    images, labels = synthetic_digits(2000, seed=5)
    np.savez("sorted.npz", images=images[labels.argsort()].numpy())
    flags = ["--images", "sorted.npz", "--dataset", "synthetic", "--num_samples", 200]
    assert cli("validation", *flags)[0] == 0
    assert all(row["n"] > 5 for row in scores_in("outputs/sorted")["classes"])


def test_results_never_take_the_place_of_others(cli, monkeypatch, small_synthetic, tiny_checkpoint):
    flags = ["--num_samples", 60, "--steps", 2]
    for name in ("run_v1.5", "run_v1.6"):
        Path(name).mkdir()
        for image, number in zip(synthetic_digits(60, seed=5)[0], range(60), strict=True):
            Image.fromarray(image[0].numpy()).save(f"{name}/{number}.png")
        assert cli("validation", "--images", name, "--dataset", "synthetic")[0] == 0
        assert scores_in(f"outputs/{name}")["n"] == 60
    path = ["--path_to_model", tiny_checkpoint("n" * 240 + ".pth")]  # longer than a name can be
    assert cli("validation", *path, *flags)[0] == 0
    path = ["--path_to_model", tiny_checkpoint(), "--experiment_name", "m"]
    different = [["--seed", 1], ["--sampler", "ddim"], ["--guidance", 1], ["--eta", 0]]
    for more in ([], *different, ["--memorization"]):
        assert cli("validation", *path, *flags, *more)[0] == 0
    assert len(list(Path("outputs/m").glob("scores_tiny_mnist_60_*.json"))) == 6
    images, labels = (part.numpy() for part in synthetic_digits(60, seed=5))
    np.savez("reference.npz", images=load_dataset("synthetic", "", "test").images.numpy())
    against = ["--reference_images", "reference.npz"]
    for asked, more in ((labels, []), (labels[::-1], []), (labels, against)):
        np.savez("told.npz", images=images, labels=asked)
        flags = ["--images", "told.npz", "--dataset", "synthetic"]
        assert cli("validation", *flags, *more)[0] == 0
    assert len(list(Path("outputs/told").glob("*.json"))) == 3
    monkeypatch.chdir("run_v1.5")
    assert cli("validation", "--images", ".", "--dataset", "synthetic")[0] == 0
    assert scores_in("outputs/run_v1.5")["n"] == 60


def test_a_score_that_cannot_be_written_is_reported_before_the_work(refuses, tiny_checkpoint):
    Path("outputs").write_text("a file")
    flags = ["--path_to_model", tiny_checkpoint(), "--data_dir", "none"]
    refuses("validation", *flags, words=("output folder outputs", "cannot be written"))


def bad_images(kind):
    images = synthetic_digits(6, seed=5)[0].numpy()
    if kind == "empty folder":
        Path("in").mkdir()
    elif kind == "mixed sizes":
        pngs(Path("in"), [images[0, 0], images[1, 0, :20]])
    elif kind == "colour":
        pngs(Path("in"), np.arange(9 * 28 * 28 * 3, dtype=np.uint8).reshape(9, 28, 28, 3))
    elif kind == "truncated png":
        pngs(Path("in"), images[:, 0])
        Path("in/3.png").write_bytes(Path("in/3.png").read_bytes()[:60])
    elif kind == "five images":
        np.save("in.npy", images[:5])
    elif kind == "another size":
        np.save("in.npy", images[:, :, :20, :20])
    elif kind == "floats":
        np.save("in.npy", images / 16)
    elif kind == "text":
        Path("in.npz").write_text("hello")
    elif kind == "pickle":
        np.save("in.npy", np.array([{}], dtype=object), allow_pickle=True)
    return next(iter(Path().glob("in*")), "in")


KINDS = ["missing", "empty folder", "mixed sizes", "colour", "truncated png", "five images"]
KINDS += ["another size"]


@pytest.mark.parametrize("kind", [*KINDS, "floats", "text", "pickle"])
def test_bad_images_are_refused(refuses, small_synthetic, kind):
    path = bad_images(kind)
    refuses("validation", "--images", path, "--dataset", "synthetic", words=(f"--images {path}",))


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ("nothing to score",)),
        (["--experiment_name", "none"], ("--experiment_name none", "no checkpoints")),
        (["--num_samples", "5"], ("--num_samples 5", ">= 6")),
        (["--features", "vgg"], ("--features vgg", "mnist, inception")),
        (["--dims", "100"], ("--dims 100", "64, 192, 768, 2048")),
        (["--images", "a", "--path_to_model", "b"], ("--images", "--path_to_model")),
        (["--images", ""], ('--images ""', "empty")),
        (["--images", "a", "--eta", "1"], ("--images", "--eta")),
        (["--json", "a.txt", "--images", "a"], ("--json a.txt", ".json")),
        (["--validate_all"], ("--validate_all", "--experiment_name")),
    ],
)
def test_bad_flags_of_validation(refuses, flags, words):
    refuses("validation", *flags, words=words)


@pytest.mark.parametrize("flags", [["--guidance", "2"], ["--tstr"]])
def test_without_labels_nothing_is_guided_and_no_class_learnt(refuses, tiny_checkpoint, flags):
    path = tiny_checkpoint(class_conditional=False)
    words = (" ".join(flags), "unconditional")
    refuses("validation", "--path_to_model", path, "--num_samples", 10, *flags, words=words)


def test_scripts_run_from_a_shell(own_folder):
    """What the tests above do in one process, once as a person does it, in another folder."""
    bad = shell("generate", "--checkpoint", "none.pth", cwd=own_folder)
    assert bad.communicate()[1] == "generate.py: error: --checkpoint none.pth: no such file\n"
    assert bad.returncode == 2
    good = shell("generate", "--num_samples", 2, "--steps", 2, cwd=own_folder)  # as is shipped
    assert "Traceback" not in good.communicate()[1] and good.returncode == 0
    assert (own_folder / "outputs" / "samples.png").exists()


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def test_tensorboard_serves_the_run(cli, own_folder):
    assert cli("main", *TINY, "--epochs", 2, "--experiment_name", "tb")[0] == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--load_fast=false"], stderr=subprocess.PIPE, text=True
    )
    try:
        lines = iter(server.stderr.readline, "")
        line = next(line for line in lines if "http://" in line)
        url = line[line.index("http://") :].split()[0].rstrip("/") + "/data/plugin"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            tags = json.loads(get(f"{url}/scalars/tags")).get("tb", {})
            pictures = json.loads(get(f"{url}/images/tags")).get("tb", {})
            if len(tags) >= 4 and len(pictures) >= 2:
                break
            time.sleep(0.5)
        assert {f"train/{k}" for k in ("loss", "lr", "grad_norm", "images_per_second")} <= set(tags)
        loss = json.loads(get(f"{url}/scalars/scalars?run=tb&tag=train/loss"))
        assert [point[1] for point in loss] == [4, 8]
        assert {"samples", "noise_schedule"} <= set(pictures)
        picture = json.loads(get(f"{url}/images/images?run=tb&tag=samples&sample=0"))[-1]
        png = get(f"{url}/images/individualImage?{picture['query']}")
        (own_folder / "served.png").write_bytes(png)
        assert Image.open("served.png").size[0] > 200
    finally:
        server.kill()

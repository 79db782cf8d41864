"""`main.py --teacher`: both phases of a distillation, resumed, shared and refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from config import TrainConfig
from models import build_model
from models.trained import load_trained
from tests.conftest import DIGITS, same, save_model
from tests.processes import ranks
from training.distiller import DistillingTrainer, inherited
from training.matching import Matching
from training.tuning import LOG_SIGMA, TOP_EVERY, TOP_LEVELS, Draws
from utils.synthetic import synthetic_digits

TINY = ["--train_size", 64, "--batch_size", 16, "--sample_every", 0, "--device", "cpu"]
TINY += ["--precision", "fp32", "--epochs", 2, "--keep", 9]  # 8 steps: 4 of tuning, 4 of matching


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    """A training set that is drawn in no time."""
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 64, "test": 64})


@pytest.fixture
def teacher(own_folder):
    """A function that writes a tiny model whose random weights do something; its path."""

    def make(name="teacher.pth", **settings):
        cfg = TrainConfig(**{"width": 8, "timesteps": 20, "dataset": "synthetic", **settings})
        torch.manual_seed(1)
        net = build_model(cfg, DIGITS)
        for p in net.parameters():
            if p.ndim >= 2 and not p.any():  # what starts at zero
                torch.nn.init.normal_(p, std=0.1)
        save_model(own_folder / name, cfg, net.state_dict())
        return own_folder / name

    return make


def last(name):
    return torch.load(f"checkpoints/{name}/model_epoch_1.pth", weights_only=True)


PARTS = ("network", "ema", "optimizers", "fake", "critic", "generator", "step")


def test_a_run_cut_in_either_phase_ends_bitwise_as_if_it_were_not(cli, teacher, monkeypatch):
    command = [*TINY, "--teacher", teacher()]
    assert cli("main", *command, "--experiment_name", "whole")[0] == 0
    phases = []
    for step in (2, 4, 6):  # the second is where one phase ends

        def interrupt(run, *others, step=step):
            if run.step == step:
                run.save()
                phases.append(type(run.trainer.phase).__name__)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("training.loop.LOG_EVERY", 1)
            patch.setattr("training.loop.report", interrupt)
            assert cli("main", *command, "--experiment_name", "cut")[0] == 130
    assert phases == ["Tuning", "Tuning", "Matching"]
    status, stdout, stderr = cli("main", *command, "--experiment_name", "cut")
    assert status == 0 and "step 6" in stdout, stderr
    one, other = last("whole"), last("cut")
    assert one["taken"] == one["fake"]["taken"] == one["critic"]["taken"] == 4
    for part in PARTS:
        assert same(one[part], other[part]), part


def test_two_processes_distil_as_one(cli, teacher):
    for number, (image, label) in enumerate(zip(*synthetic_digits(80, seed=0), strict=True)):
        Path(f"digits/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(f"digits/{label}/{number}.png")
    command = [*TINY, "--teacher", teacher(dataset="folder"), "--data_dir", "digits"]
    assert cli("main", *command, "--experiment_name", "one")[0] == 0
    ranks(2, "main", *command, "--experiment_name", "two")
    one, two = last("one"), last("two")
    assert one["step"] == two["step"] == 8 and torch.equal(one["generator"], two["generator"])
    start = torch.load("teacher.pth", weights_only=True)["ema"]
    assert apart(one["ema"], two["ema"]) < 1e-3 * apart(one["ema"], start)
    fake, critic = ([run[name]["network"] for run in (one, two)] for name in ("fake", "critic"))
    assert apart(*fake) < 1e-3 * apart(fake[0], start)
    assert apart(*critic) < 1e-3 * apart(critic[0], {key: 0 * v for key, v in critic[0].items()})


def apart(a, b):
    """The distance of two networks; Adam makes single weights of what rounding makes of them."""
    alike = [key for key in a if a[key].shape == b[key].shape]
    return sum((a[key] - b[key]).square().sum() for key in alike).sqrt()


@pytest.mark.parametrize("settings", [{"model_type": "cnn"}, {"class_conditional": False}])
def test_the_checkpoint_explains_itself(cli, teacher, settings):
    path = teacher(**settings, prediction="x0", schedule="linear")
    command = ["main", *TINY, "--teacher", path, "--experiment_name", "few"]
    status, stdout, stderr = cli(*command)
    assert status == 0, stderr
    distilled = Path("checkpoints/few/model_epoch_1.pth")
    model = load_trained(distilled, "cpu")
    assert model.few_step and model.config.schedule == "linear" and model.config.width == 8
    assert model.config.model_type == settings.get("model_type", "unet")
    for steps in ([], ["--steps", 2], ["--steps", 4]):
        draw = ["--checkpoint", distilled, "--num_samples", 3, *steps]
        status, stdout, stderr = cli("generate", *draw)
        assert status == 0 and "consistency" in stderr, stderr
    assert cli("main", *command[1:-1], "few", "--teacher", distilled)[0] == 2


def distilling(teacher):
    """A trainer, and a batch of eight digits with labels."""
    path = str(teacher())
    cfg = TrainConfig(teacher=path, batch_size=8, **inherited(path))
    x0, y = synthetic_digits(8, seed=0)
    trainer = DistillingTrainer(cfg, DIGITS, torch.device("cpu"))
    return trainer, x0.float() / 127.5 - 1, y


def test_tuning_lowers_its_loss(teacher):
    trainer, x0, y = distilling(teacher)
    drawn, losses = trainer.generator.get_state(), []
    for _ in range(30):
        trainer.generator.set_state(drawn)  # the same levels and noise
        losses.append(trainer.train_step(x0, y, 0.2)[0].item())
    assert losses[-1] < 0.9 * losses[0]


def test_images_are_led_to_where_the_teacher_sees_them(teacher, monkeypatch):
    """Where the fake puts 0.5 and the teacher 0.1, a step down the gradient darkens."""
    trainer, x0, y = distilling(teacher)
    trainer.begin_matching()
    phase, plain, second = trainer.phase, Matching.denoised, torch.arange(8) % 2
    monkeypatch.setattr("training.matching.CRITIC_WEIGHT", 0.0)

    def denoised(self, net, *given):
        return 0 * plain(self, net, *given) + (0.5 if net is self.fake.net else 0.1)

    monkeypatch.setattr(Matching, "denoised", denoised)
    draws = Draws(trainer.generator, x0.shape)
    assert (phase.gradients(draws, x0, x0, y, second, y + 11 * second)[0] > 0).all()


def test_images_are_led_to_what_the_critic_likes(teacher, monkeypatch):
    """Here it likes bright pixels, so a step down the gradient brightens."""
    trainer, x0, y = distilling(teacher)
    trainer.begin_matching()
    seen, second = [], torch.arange(8) % 2
    monkeypatch.setattr("training.matching.CRITIC_WEIGHT", 1e6)

    def denoised(self, net, x, *given):
        seen.append(x)
        return x

    monkeypatch.setattr(Matching, "denoised", denoised)
    monkeypatch.setattr(Matching, "opinions", lambda self, maps, second: [seen[0]])
    draws = Draws(trainer.generator, x0.shape)
    gradient = trainer.phase.gradients(draws, x0, x0, y, second, y + 11 * second)[0]
    assert (gradient < 0).all()


def test_the_critic_learns_to_like_real_images(teacher, monkeypatch):
    trainer, x0, y = distilling(teacher)
    trainer.begin_matching()
    generated, second = [], torch.arange(8) % 2

    def opinions(self, maps, second):
        if maps[0].requires_grad:  # the images to lead
            generated.append(maps[0].detach())
            return [maps[0]]
        return [torch.tensor(-2.0 if torch.equal(maps[0], generated[0]) else 2.0)]

    monkeypatch.setattr(Matching, "opinions", opinions)
    draws = Draws(trainer.generator, x0.shape)
    opposed = trainer.phase.gradients(draws, x0, x0, y, second, y + 11 * second)[1]
    assert opposed == 0


def test_levels_of_tuning_include_the_highest_and_those_of_matching_the_lowest(teacher):
    trainer, x0, y = distilling(teacher)
    draws = Draws(trainer.generator, torch.Size([8000, *x0.shape[1:]]))
    levels = trainer.phase.schedule.sigmas
    sigma = trainer.phase.draw_levels(draws)
    high = sigma[::TOP_EVERY]
    assert torch.isin(high, levels[-TOP_LEVELS:]).all() and len(high.unique()) == TOP_LEVELS
    mean, std = LOG_SIGMA
    others = sigma[torch.arange(8000) % TOP_EVERY > 0].log()
    assert others.median().item() == pytest.approx(mean, abs=0.1 * std)
    share = draws.stratified().sort().values * 8000
    assert torch.equal(share.floor(), torch.arange(8000).double())
    trainer.begin_matching()
    t = trainer.phase.schedule.t_at(trainer.phase.draw_levels(draws)).round()
    low = (t < 4).double().mean().item()  # of T = 20: a fifth
    assert low == pytest.approx(0.1 + 0.9 * 0.19 / 0.97, abs=0.03)


def test_matching_begins_at_a_share_of_the_run_with_what_tuning_has_averaged(teacher):
    trainer, x0, y = distilling(teacher)
    for _ in range(3):
        trainer.train_step(x0, y, 0.0)
    tuned = {name: p.clone() for name, p in trainer.model.net.named_parameters()}
    last_tuned = {name: p.clone() for name, p in trainer.optimization.net.named_parameters()}
    trainer.begin_matching()
    assert isinstance(trainer.phase, Matching) and not same(tuned, last_tuned)
    assert same(tuned, dict(trainer.optimization.net.named_parameters()))
    fake, teacher_net = trainer.phase.fake.net, trainer.teacher.net
    assert torch.equal(fake.stem.weight, teacher_net.stem.weight)
    before = {name: p.clone() for name, p in teacher_net.named_parameters()}
    draws, second = Draws(trainer.generator, x0.shape), torch.arange(8) % 2
    gap = trainer.phase.gradients(draws, x0, x0, y, second, y + 11 * second)[-1]
    assert gap < 1e-6  # fake = teacher
    norms = [trainer.train_step(x0, y, 0.5)[1] for _ in range(2)]
    assert all(norm > 0 for norm in norms)
    assert same(before, dict(teacher_net.named_parameters()))


@pytest.mark.parametrize(
    "settings, flags, words",
    [
        ({}, ["--width", 16], ("--width 16", "the teacher has 8")),
        ({}, ["--model_type", "cnn"], ("--model_type cnn", "the teacher has unet")),
        ({}, ["--schedule", "linear"], ("--schedule linear", "the teacher has cosine")),
        ({}, ["--label_dropout", 0.1], ("--label_dropout 0.1", "must be 0")),
        ({}, ["--compile"], ("--compile", "--teacher")),
        ({"prediction": "eps"}, [], ("predicts eps", "v or x0")),
        ({"teacher": "a.pth"}, [], ("was distilled itself",)),
        ({"model_type": "resnet"}, ["--model_type", "unet"], ("--model_type unet", "resnet")),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(refuses, teacher, settings, flags, words):
    refuses("main", *TINY, "--teacher", teacher(**settings), *flags, words=words)
    assert not Path("checkpoints").exists()


def test_a_teacher_without_a_file_is_refused(refuses):
    refuses("main", "--teacher", "none.pth", words=("--teacher none.pth", "no such file"))

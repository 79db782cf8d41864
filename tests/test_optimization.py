"""The step: written out, with and without `if`, and what is left of it in a checkpoint."""

import copy
import dataclasses

import pytest
import torch

from benchmarks.parts import cost_of_parts
from config import TrainConfig, UserError
from models import build_model
from tests.conftest import DIGITS, same
from training.denoising import DenoisingTrainer
from training.ema import EMA
from training.graphed import GraphedOptimization
from training.optimization import Optimization, build_optimizers, learning_rate
from utils import random
from utils.data_loader import to_model_range
from utils.synthetic import synthetic_digits

CPU = torch.device("cpu")
CFG = TrainConfig(width=8, timesteps=20, precision="fp32", dataset="synthetic", batch_size=20)
KINDS = [Optimization, GraphedOptimization]


class Spoilt:
    """A trainer's loss multiplied by a third input, which may be no number."""

    def __init__(self, trainer):
        self.trainer, self.generator = trainer, trainer.generator
        images, labels = synthetic_digits(100, seed=1)
        self.images, self.labels = (x.to(trainer.device) for x in (images, labels))

    def __call__(self, x0, y, factor):
        return self.trainer.loss(x0, y) * factor


def start(kind, device=CPU, cfg=CFG):
    """A new training of `kind`: the optimization and its loss."""
    trainer = DenoisingTrainer(cfg, DIGITS, device)
    torch.manual_seed(0)
    for p in trainer.net.parameters():  # the last layers begin at 0: nothing before them learns
        torch.nn.init.normal_(p, std=0.05)
    own = {"generators": [trainer.generator]} if kind is GraphedOptimization else {}
    options = {"grad_clip": cfg.grad_clip, "ema_length": cfg.ema_length, **own}
    return kind(trainer.net, trainer.optimization.optimizers, **options), Spoilt(trainer)


def inputs(k, loss, bad=()):
    """A batch, and the factor that spoils it."""
    index = (torch.arange(CFG.batch_size) + 7 * k) % len(loss.images)
    index = index.to(loss.images.device)
    factor = torch.tensor(float("nan") if k in bad else 1.0, device=loss.images.device)
    return to_model_range(loss.images[index]), loss.labels[index], factor


def run(optimization, loss, steps, bad=()):
    """Steps at a learning rate that changes, those numbered `bad` without effect; their losses."""
    losses = [optimization.step(loss, *inputs(k, loss, bad), lr=4e-3 / (1 + k))[0] for k in steps]
    return torch.stack(losses).tolist()


def assert_close(ours, theirs, **tolerance):
    for kept, other in zip(ours.optimizers, theirs.optimizers, strict=True):
        state, wanted = kept.state_dict()["state"], other.state_dict()["state"]
        assert state.keys() == wanted.keys()
        for p in state:
            torch.testing.assert_close(state[p], wanted[p], **tolerance)
    for net, other in ((ours.net, theirs.net), (ours.ema.model, theirs.ema.model)):
        torch.testing.assert_close(net.state_dict(), other.state_dict(), **tolerance)


def test_the_plain_step_is_the_step_written_out_bit_for_bit():
    ours, loss = start(Optimization)
    losses = run(ours, loss, range(8), bad=[3])
    theirs, loss = start(Optimization)
    net, ema = theirs.net, EMA(theirs.net, CFG.ema_length)
    taken = 0
    for k in range(8):
        for optimizer in theirs.optimizers:
            optimizer.param_groups[0]["lr"] = 4e-3 / (1 + k)
        value = loss(*inputs(k, loss, bad=[3]))
        net.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CFG.grad_clip)
        if norm.isfinite():
            taken += 1
            for optimizer in theirs.optimizers:
                optimizer.step()
            ema.update(net, taken)
        assert losses[k] == value.item() or k == 3
    assert (ours.taken, ours.skipped) == (taken, 1) == (7, 1)
    assert same(ours.net.state_dict(), net.state_dict())
    assert same(ours.ema.model.state_dict(), ema.model.state_dict())


def test_steps_without_a_look_at_any_value_are_the_plain_ones():
    trainings = [start(kind) for kind in KINDS]
    plain, graphed = (run(*training, range(30), bad=[9]) for training in trainings)
    assert [k for k, value in enumerate(plain) if value != value] == [9]
    assert graphed == pytest.approx(plain, rel=1e-4, nan_ok=True)
    (ours, _), (theirs, _) = trainings
    theirs.check()
    assert (ours.taken, ours.skipped) == (theirs.taken, theirs.skipped) == (29, 1)
    assert_close(theirs, ours, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(kind):
    optimization, loss = start(kind)
    run(optimization, loss, range(3))
    before = copy.deepcopy(optimization.state())
    run(optimization, loss, [3], bad=[3])
    after = optimization.state()
    assert (after["taken"], after["skipped"]) == (3, 1)
    for kept, optimizer in zip(before["optimizers"], after["optimizers"], strict=True):
        assert same(kept["state"], optimizer["state"])
    assert same(before["network"], after["network"]) and same(before["ema"], after["ema"])
    run(optimization, loss, [4])
    assert not same(before["network"], optimization.state()["network"])


@pytest.mark.parametrize("kind", KINDS)
def test_three_bad_steps_in_a_row_end_the_run_and_two_do_not(kind):
    optimization, loss = start(kind)
    run(optimization, loss, range(6), bad=[0, 2, 3, 5])
    optimization.check()
    optimization, loss = start(kind)
    with pytest.raises(UserError, match="3 times in a row.*--lr"):
        run(optimization, loss, range(7), bad=[2, 3, 4])  # and two good ones before anybody looks
        optimization.check()


def test_a_rehearsal_leaves_no_trace():
    rehearsed, loss = start(GraphedOptimization)
    states = [generator.get_state() for generator in rehearsed.generators]
    rehearsed._step_nowhere(loss, *inputs(0, loss))
    for generator, state in zip(rehearsed.generators, states, strict=True):
        generator.set_state(state)
    run(rehearsed, loss, range(4))
    fresh, loss = start(GraphedOptimization)
    run(fresh, loss, range(4))
    assert same(rehearsed.state(), fresh.state())


@pytest.mark.parametrize("first, second", [KINDS, KINDS[::-1]])
def test_a_checkpoint_of_one_kind_goes_on_as_the_other(first, second):
    one, loss = start(first)
    run(one, loss, range(5), bad=[1])
    state = copy.deepcopy(one.state())
    for optimizer in state["optimizers"]:
        (group,) = optimizer["param_groups"]
        assert isinstance(group["lr"], float) and not group.get("capturable")
    drawn = loss.generator.get_state()
    losses = run(one, loss, range(5, 8))
    two, loss = start(second)
    two.load_state(state)
    loss.generator.set_state(drawn)
    assert run(two, loss, range(5, 8)) == pytest.approx(losses, rel=1e-4)
    two.check()
    assert (two.taken, two.skipped) == (7, 1)
    assert_close(two, one, atol=1e-5, rtol=1e-3)


def test_a_damaged_optimizer_state_is_refused():
    optimization, loss = start(Optimization)
    run(optimization, loss, [0])
    state = copy.deepcopy(optimization.state())
    state["optimizers"][1]["state"][0]["momentum"] = torch.zeros(3)
    with pytest.raises(ValueError, match="shape"):
        optimization.load_state(state)


def test_the_options_of_optimizers_are_those_of_the_device_that_resumes():
    """On MPS, AdamW is not fused; its checkpoint must also go on where it is."""
    one, loss = start(Optimization)
    run(one, loss, [0])
    state = copy.deepcopy(one.state())
    assert state["optimizers"][0]["param_groups"][0]["fused"]
    state["optimizers"][0]["param_groups"][0]["fused"] = False
    one.load_state(state)
    assert one.state()["optimizers"][0]["param_groups"][0]["fused"]
    state["optimizers"][1]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="other weights"):
        one.load_state(state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_a_count_of_effective_steps_goes_on(kind):
    """As those were before it: the average then goes on from steps less those skipped."""
    optimization, loss = start(kind)
    run(optimization, loss, range(6), bad=[1, 4])
    old = {**optimization.state(), "step": 6}
    assert old.pop("taken") == 4
    again, _ = start(kind)
    again.load_state(old)
    assert again.state()["taken"] == 4


def test_the_trainer_draws_anew_where_a_state_is_of_another_device():
    """In the generator that a recording knows, not in a new one."""
    one, two = (DenoisingTrainer(CFG, DIGITS, CPU) for _ in range(2))
    state = {**one.state(), "step": 5, "device": "cuda"}
    before = two.generator
    two.load_state(state)
    assert two.generator is before
    fresh = random.generator(random.Stream.NOISE, CFG.seed, 5)
    assert torch.equal(before.get_state(), fresh.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_operations_of_a_step_s_parts(kind, monkeypatch):
    """Backward has two products for one of forward, but for the first layer; Muon, its own."""
    monkeypatch.setattr("training.denoising.Optimization", kind)
    trainers = [DenoisingTrainer(CFG, DIGITS, CPU) for _ in range(2)]
    batch = inputs(0, Spoilt(trainers[0]))[:2]
    costs = cost_of_parts(*trainers, *batch, times=1)
    assert list(costs) == ["forward", "backward", "clip", "adamw", "muon", "ema"]
    operations = {name: cost.operations for name, cost in costs.items()}
    assert 1.7 < operations["backward"] / operations["forward"] <= 2
    assert operations["muon"] > 0 and not any(operations[name] for name in ("clip", "adamw", "ema"))


def test_labels_are_hidden_as_often_as_asked_and_reach_the_network():
    trainer = DenoisingTrainer(dataclasses.replace(CFG, label_dropout=0.2), DIGITS, CPU)
    y, seen = torch.arange(10).repeat(500), []

    def call(x, t, y):
        seen.append(y)
        return torch.zeros_like(x)

    trainer.called = call
    trainer.loss(torch.zeros(len(y), 1, 4, 4), y)
    hidden = seen[0] == 10
    assert hidden.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(seen[0][~hidden], y[~hidden])


def test_muon_gets_the_inner_matrices_and_adamw_all_else():
    net = build_model(CFG, DIGITS)
    adamw, muon = build_optimizers(net, CFG, CPU)
    names = {id(p): name for name, p in net.named_parameters()}
    inner, others = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (muon, adamw))
    assert inner.isdisjoint(others) and inner | others == set(names.values())
    assert all(net.get_parameter(n).ndim >= 2 and not n.startswith(net.outer) for n in inner)
    assert all(net.get_parameter(n).ndim < 2 or n.startswith(net.outer) for n in others)


def test_the_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(2.0, progress) for progress in (0.0, 0.0095, 0.019, 0.4, 0.7, 1.0)]
    assert rates == pytest.approx([0.1, 1.05, 2.0, 2.0, 1.0, 0.0])

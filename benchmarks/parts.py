"""Where the time of a training step goes, beside the machine's fastest matrix product."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import seconds_each
from training.denoising import DenoisingTrainer
from training.graphed import GraphedOptimization
from utils.graphs import Graphed

FOLLOWING = "forward, backward"  # measured together: backward needs forward


@dataclass(frozen=True)
class Cost:
    """The time of a part of a step, and the floating-point operations of its matrix products."""

    seconds: float
    operations: int

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.operations - other.operations)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest matrix product on this machine, in `dtype`."""
    rates = []
    for n in (512, 1024, 2048, 4096) + (8192,) * (device.type == "cuda"):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n**3 / seconds_each(lambda a=a, b=b: a @ b, device))
    return max(rates)


def parts_of(trainer: DenoisingTrainer, x0: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The parts of `Optimization.step`, in order, as separate calls; each needs those before it."""
    optimization = trainer.optimization
    net, graphed = optimization.net, isinstance(optimization, GraphedOptimization)
    bad = torch.zeros((), device=x0.device)
    one = torch.ones((), dtype=torch.float64, device=x0.device)

    def gradient() -> None:
        net.zero_grad()
        trainer.loss(x0, y).backward()

    def updated(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        return lambda: optimization.update(optimizer, bad) if graphed else optimizer.step()

    def averaged() -> None:
        if graphed:
            optimization.ema.update_unless(bad, net, one)
        else:
            optimization.ema.update(net, 1)

    return {
        "forward": lambda: trainer.loss(x0, y).detach(),
        FOLLOWING: gradient,
        "clip": lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), optimization.grad_clip),
        **{type(each).__name__.lower(): updated(each) for each in optimization.optimizers},
        "ema": averaged,
    }


def cost_of_parts(
    trainer: DenoisingTrainer, eager: DenoisingTrainer, x0: Tensor, y: Tensor, times: int
) -> dict[str, Cost]:
    """The cost of each part of a step alone, on CUDA as its own graph; backward by difference.

    Operations are counted in `eager`, the same trainer without compilation. Neither trainer is
    usable afterwards.
    """
    for each in (trainer, eager):  # optimizers create their state at the first step
        each.train_step(x0, y, progress=0.0)
    counted, costs = parts_of(eager, x0, y), {}
    for name, part in parts_of(trainer, x0, y).items():
        with FlopCounterMode(display=False) as counter:
            counted[name]()
        work = part
        if isinstance(trainer.optimization, GraphedOptimization):
            graph = Graphed(lambda _, part=part: part(), trainer.optimization.generators)
            work = lambda graph=graph: graph(y)  # noqa: E731
        costs[name] = Cost(seconds_each(work, x0.device, times), counter.get_total_flops())
    both = costs.pop(FOLLOWING)
    rest = {name: costs.pop(name) for name in list(costs) if name != "forward"}
    return {**costs, "backward": both - costs["forward"], **rest}

"""An `Optimization` step as one CUDA graph, which does not read any value from the device.

Each `if` of `Optimization` becomes arithmetic here: a bad step has length 0. Python runs ahead of
the device, and reads the counts only for reports and checkpoints.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from models.layers import NoisePredictor
from training.optimization import Loss, Optimization
from utils.graphs import Graphed, in_parallel


class GraphedOptimization(Optimization):
    """`Optimization` for one process on CUDA. Elsewhere its steps run one operation at a time.

    A loss is recorded at its first step, together with the update that follows it. It must meet the
    conditions of `Graphed`.

    Args:
        generators: those that the losses draw random numbers from.
        others: the other arguments of `Optimization`.
    """

    def __init__(
        self,
        net: NoisePredictor,
        optimizers: list[torch.optim.Optimizer],
        *,
        generators: Sequence[torch.Generator] = (),
        **others: float,
    ):
        super().__init__(net, optimizers, **others)
        self.generators = generators
        self.device = next(net.parameters()).device
        self.lr = torch.zeros((), device=self.device)
        # steps taken, steps skipped, skipped in a row until now, and the longest such row
        self.counts = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.graphs: dict[Loss, Graphed] = {}

    def step(self, loss: Loss, *inputs: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """As in `Optimization`, but bad steps are noticed only at the next `check`."""
        self.set_lr(lr)
        self.lr.fill_(lr)
        if loss not in self.graphs:
            step, rehearsal = partial(self._step, loss), partial(self._step_nowhere, loss)
            self.graphs[loss] = Graphed(step, self.generators, rehearsal)
        value, norm = self.graphs[loss](*inputs)
        return value.clone(), norm.clone()

    def _step(self, loss: Loss, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(*inputs)
        self.net.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        bad = 1 - norm.isfinite().float()
        taken = self._count(bad)
        updates = [partial(self.update, optimizer, bad) for optimizer in self.optimizers]
        in_parallel(updates, self.device)
        self.ema.update_unless(bad, self.net, taken)
        return value.detach(), norm

    def _step_nowhere(self, loss: Loss, *inputs: Tensor) -> None:
        """A step with a loss of NaN, which is not counted: it leaves no trace."""
        counts = self.counts.clone()
        self._step(lambda *given: loss(*given) * math.nan, *inputs)
        self.counts.copy_(counts)

    def _count(self, bad: Tensor) -> Tensor:
        taken, skipped, in_a_row, most = self.counts.unbind()
        taken += 1 - bad
        skipped += bad
        in_a_row.add_(1).mul_(bad)
        most.copy_(torch.maximum(most, in_a_row))
        return taken

    def update(self, optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
        """Step an optimizer that supports `found_inf`, with the learning rate on the device."""
        group = optimizer.param_groups[0]
        recorded = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        own = {"lr": self.lr, "capturable": recorded}
        before = {key: group[key] for key in own if key in group}
        group.update({key: own[key] for key in before})
        optimizer.found_inf = bad
        optimizer.step()
        optimizer.found_inf = None
        group.update(before)

    def check(self) -> None:
        """Wait for the device, read its counts. Raises UserError after three bad steps in a row."""
        self._read_counts()
        super().check()

    def _read_counts(self) -> None:
        self.taken, self.skipped, _, self.bad_in_a_row = map(int, self.counts.tolist())

    def state(self) -> dict:
        self._read_counts()
        return super().state()

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.graphs.clear()  # they would update the optimizers' old state
        counts = [self.taken, self.skipped, 0, 0]
        self.counts.copy_(torch.tensor(counts, dtype=torch.float64))

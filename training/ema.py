"""The averaged copy of a network, which is used for sampling."""

import copy

import numpy as np
import torch
from torch import Tensor, nn


def power_exponent(length: float) -> float:
    """gamma of the averaging profile t^gamma whose relative width is `length`, in (0, 0.288).

    The width is the profile's standard deviation over the run so far: the largest real root of
    gamma^3 + 7 gamma^2 + (16 - length^-2) gamma + (12 - length^-2) (Karras et al. 2024, alg. 2).
    """
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real.max())


class EMA:
    """Power-function moving average (Karras et al. 2024, "Analyzing and Improving...", eq. 2).

    Its length is a fraction of the run so far, so it suits a run of two minutes as well as one of
    two days. Step 1 copies the network, so nothing of the random initial weights remains.

    Attributes:
        model: the averaged network, in eval mode, without gradients.
    """

    def __init__(self, net: nn.Module, length: float):
        self.exponent = power_exponent(length) + 1
        self.model = copy.deepcopy(net).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Add the network to the average after optimizer step number `step` = 1, 2, ..."""
        decay = (1 - 1 / step) ** self.exponent
        averaged, current = list(self.model.parameters()), list(net.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @torch.no_grad()
    def update_unless(self, bad: Tensor, net: nn.Module, step: Tensor) -> None:
        """`update` if `bad` is 0, nothing if it is 1; does not read any value from the device.

        Args:
            bad, step: scalars on the device; `step` is float64, and may be 0 if `bad` is 1.
        """
        decay = (1 - 1 / step.clamp(min=1)) ** self.exponent
        weight = ((1 - decay) * (1 - bad)).float()
        averaged, current = list(self.model.parameters()), list(net.parameters())
        change = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averaged, change)

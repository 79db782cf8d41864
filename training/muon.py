"""The Muon optimizer: steps along orthogonalized momentum."""

from functools import partial

import torch
from torch import Tensor

from utils.graphs import in_parallel

# of Newton-Schulz iterations (Jordan et al. 2024): five map singular values 0.002..1 to 0.68..1.2
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately U V^T of matrices (N, R, C) with singular value decomposition U S V^T; float32.

    This applies an odd polynomial of the matrix repeatedly, which acts on its singular values. It
    needs only matrix products, and bfloat16 is precise enough.
    """
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), for the weights of layers between other layers.

    A convolution's weight (out, in, height, width) is treated as a matrix (out, in * height *
    width). The momentum of its gradients is orthogonalized before each step, so a layer learns in
    all directions at the same rate. Steps are as large as AdamW's (Liu et al. 2025, section 2.2),
    so one learning rate serves both.

    Args: weights of two or more dimensions, learning rate, decoupled weight decay, momentum, and
        the precision of the matrix products.

    Attributes:
        found_inf: None, or a scalar on the device. If it is 1, steps change nothing; else it is 0.
            With a scalar, the learning rate must be a scalar on the device, too. (torch's own
            optimizers use this name.)
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.found_inf = dtype, None

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            if self.found_inf is not None:
                self._step_on_device(params, group)
            elif params:
                self._step(params, group)

    def _step(self, params: list[Tensor], group: dict) -> None:
        by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for p, direction in zip(params, self._directions(params, group), strict=True):
            matrix = direction.reshape(len(p), -1)
            by_shape.setdefault(matrix.shape, []).append((p, matrix))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for shape, pairs in by_shape.items():  # combine many small products into a few larger ones
            alike, matrices = zip(*pairs, strict=True)
            updates = orthogonalize(torch.stack(matrices), self.dtype)
            updates = [update.view(p.shape) for p, update in zip(alike, updates, strict=True)]
            scale = -group["lr"] * 0.2 * max(shape) ** 0.5  # the root mean square of AdamW's
            torch._foreach_add_(alike, updates, alpha=scale)

    def _directions(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Nesterov momentum of the gradients."""
        gradients, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        return torch._foreach_lerp(gradients, momenta, group["momentum"])

    def _step_on_device(self, params: list[Tensor], group: dict) -> None:
        """The same in few kernels and without reading any value; does nothing if found_inf is 1.

        Here the columns of a matrix are in memory order, (height, width, in), so it is a view of
        the weight. The order of the columns affects only the rounding.
        """
        by_shape: dict[tuple, list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(as_matrix(p).shape, []).append(p)
        jobs = [partial(self._step_together, alike, group) for alike in by_shape.values()]
        in_parallel(jobs, self.found_inf.device)

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        finite = self.found_inf == 0
        momenta = [self.state[p]["momentum"] for p in params]
        momentum = torch.stack([as_matrix(m) for m in momenta])
        gradient = torch.stack([as_matrix(p.grad) for p in params])
        gradient = torch.where(finite, gradient, momentum)  # averaging with itself changes nothing
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp_(momentum, group["momentum"]), self.dtype)
        lr = group["lr"] * finite
        update *= lr * -0.2 * max(update.shape[1:]) ** 0.5
        torch._foreach_copy_(momenta, list(map(as_weight, momentum, params)))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(map(as_weight, update, params)))


def as_matrix(weight: Tensor) -> Tensor:
    """(out, in, height, width) -> (out, height * width * in): a view if channels are last."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`, a view."""
    return matrix.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)

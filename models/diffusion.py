"""The diffusion process: noising, training loss, and a network turned into a denoiser.

It owns no network and no sampler. The three meet in one line:

    x = sample_ddim(diffusion.denoiser(net, labels, guidance), x, sigmas, noise)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.noise_scheduler import NoiseSchedule

Watch = Callable[[Tensor, Tensor, Tensor], None]
Guidance = float | Callable[[Tensor], float]  # a scale, or a function of sigma that returns it

# What the network predicts, given x_t = a * x0 + s * eps with a^2 + s^2 = 1: the training target
# as a function of (x0, eps, a, s), and x0 as a function of (prediction, x_t, a, s).
# v is from Salimans & Ho 2022, section 4.
TARGETS = {
    "eps": lambda x0, eps, a, s: eps,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "x0": lambda x0, eps, a, s: x0,
}
TO_X0 = {
    "eps": lambda pred, x_t, a, s: (x_t - s * pred) / a,
    "v": lambda pred, x_t, a, s: a * x_t - s * pred,
    "x0": lambda pred, x_t, a, s: pred,
}


class Diffusion:
    """Gaussian diffusion with T levels (Ho et al. 2020) around any network.

    A network is called as net(x_t, t, y): x_t (B, C, H, W) float32, variance preserving; t (B,)
    float32 in [0, T - 1]; y (B,) int64 labels or None. It returns what `prediction` names, in the
    shape of x_t. Images are in [-1, 1].
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        t_mean: float = 0.0,
        t_std: float = 1.0,
        t_even: float = 0.0,
        loss_weight: str = "prediction",
        device="cpu",
    ):
        self.schedule, self.t_mean, self.t_std, self.t_even = schedule, t_mean, t_std, t_even
        self.target, self.to_x0 = TARGETS[prediction], TO_X0[prediction]
        self.sqrt_alpha_bar = schedule.alpha_bar.sqrt().float().to(device)
        self.sqrt_one_minus_alpha_bar = (1 - schedule.alpha_bar).sqrt().float().to(device)
        self.weight = None
        if loss_weight == "bound":
            self.weight = self.bound_weights(prediction).float().to(device)

    def draw_t(self, batch: int, generator: torch.Generator) -> Tensor:
        """Timesteps (B,) int64 to train at: t / T is sigmoid(N(t_mean, t_std^2)) or uniform.

        This is the logit-normal of Esser et al. 2024, eq. 19. It favours the middle of the
        schedule, where noise and image are equally strong and there is most to learn. It rarely
        draws either end, but at the lower end the network must remove the last faint noise, so
        a share `t_even` is drawn uniformly. The draws are stratified, one from each of B equal
        shares of the distribution: every batch covers all of it, and the loss varies less.
        """
        u = torch.rand(batch, generator=generator, device=generator.device)
        share = (torch.arange(batch, device=generator.device) + u) / batch
        even = share / max(self.t_even, 1e-9)
        rest = (share - self.t_even) / max(1 - self.t_even, 1e-9)
        normal = 2**0.5 * torch.erfinv((2 * rest - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        t = torch.where(even < 1, even, torch.sigmoid(self.t_mean + self.t_std * normal))
        return (t * self.schedule.timesteps).long().clamp(max=self.schedule.timesteps - 1)

    def t_shares(self) -> Tensor:
        """The probability that `draw_t` gives each timestep, (T,) float64."""
        upto = torch.linspace(0, 1, self.schedule.timesteps + 1, dtype=torch.float64)
        normal = torch.special.ndtr((torch.logit(upto) - self.t_mean) / self.t_std)
        return (self.t_even * upto + (1 - self.t_even) * normal).diff()

    def bound_weights(self, prediction: str) -> Tensor:
        """Weights (T,) float64 that turn the loss into the bound's diffusion term, in bits/dim.

        The likelihood bound's term is Kingma et al. 2021, eq. 13: the sum over t of
        1/2 (SNR(t-1) - SNR(t)) times the squared error of x0_hat. It does not cover t = 0, which is
        weighted as if levels continued below it.
        """
        alpha_bar, sigmas = self.schedule.alpha_bar, self.schedule.sigmas
        below = torch.cat([sigmas[:1] ** 2 / sigmas[1], sigmas[:-1]])
        of_x0 = (below**-2 - sigmas**-2) / 2 / math.log(2) / self.t_shares()
        to_x0 = {"eps": sigmas**2, "v": 1 - alpha_bar, "x0": torch.ones_like(sigmas)}
        return of_x0 * to_x0[prediction]

    def loss(
        self,
        net: nn.Module,
        x0: Tensor,
        y: Tensor | None,
        generator: torch.Generator,
        part: slice = slice(None),
    ) -> Tensor:
        """Mean squared error of the prediction (Ho et al. 2020, eq. 14), a scalar.

        Timesteps and noise are drawn for the whole batch x0, y, but the loss covers only `part` of
        it: several processes that share a batch thus make the same draws as a single one.

        An error that clamping x0_hat to [-1, 1] removes does not count: a black pixel (x0 = -1) may
        be predicted blacker than black. Samplers clamp, so this is the error of what they use. The
        minimum is still the posterior mean, which never leaves [-1, 1]. But the network no longer
        has to hit -1 to within a hundredth of the noise in the four out of five pixels that are
        black.
        """
        t = self.draw_t(len(x0), generator)[part]
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)[part]
        return self.loss_at(net, x0[part], None if y is None else y[part], t, eps)

    def loss_at(
        self, net: nn.Module, x0: Tensor, y: Tensor | None, t: Tensor, eps: Tensor
    ) -> Tensor:
        """The loss at the given timesteps t (B,) and noise eps, which has the shape of x0."""
        a = self.sqrt_alpha_bar[t].view(-1, 1, 1, 1)
        s = self.sqrt_one_minus_alpha_bar[t].view(-1, 1, 1, 1)
        x_t = a * x0 + s * eps
        prediction = net(x_t, t.float(), y).float()
        x0_hat = self.to_x0(prediction, x_t, a, s)
        error = prediction - self.target(x0, eps, a, s)
        error = error.masked_fill((x0.abs() == 1) & (x0_hat * x0 > 1), 0.0)
        if self.weight is not None:
            return (self.weight[t].view(-1, 1, 1, 1) * error.square()).mean()
        return error.square().mean()

    def x0_hat(self, net: nn.Module, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """The prediction of x0 from x = x0 + sigma * eps, (B, C, H, W), not clamped.

        Each image has its own level: sigma is (B,), float64, on the CPU. In `denoiser`, one level
        is that of the whole batch.
        """
        a = (1 + sigma**2).rsqrt()
        t = self.schedule.t_at(sigma).to(x)
        s = (sigma * a).to(x).view(-1, 1, 1, 1)
        a = a.to(x).view(-1, 1, 1, 1)
        x_t = a * x
        return self.to_x0(net(x_t, t, y).float(), x_t, a, s)

    def denoiser(
        self,
        net: nn.Module,
        labels: Tensor | None = None,
        guidance: Guidance = 1.0,
        watch: Watch | None = None,
    ) -> "Denoiser":
        """The function D(x, sigma) -> x0_hat that samplers integrate.

        Guidance is 1 + w in Ho & Salimans 2022, eq. 6: 1 is the conditional prediction and 0 the
        unconditional one, at one network call each. Any other value combines both, computed as one
        batch of 2B. It may also be a function of sigma, a 0-d tensor. It is unused without labels.
        `watch`, if given, is called as watch(x, sigma, x0_hat) after each prediction.
        """
        return Denoiser(self, net, labels, guidance, watch)


class Denoiser:
    """D(x, sigma) -> x0_hat, made by `Diffusion.denoiser`.

    x is (B, C, H, W), variance exploding (x0 + sigma * eps); sigma is a 0-d float64 tensor. x0_hat
    is clamped to [-1, 1], the range of images (as in Ho et al. 2020's sampler). Guidance combines
    clamped predictions, because the loss does not constrain them beyond black and white.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        net: nn.Module,
        labels: Tensor | None,
        guidance: Guidance,
        watch: Watch | None,
    ):
        self.diffusion, self.net, self.labels = diffusion, net, labels
        self.guidance, self.watch = guidance, watch
        # (conditional prediction, conditional minus unconditional or None) of the last two calls
        self.calls: list[tuple[Tensor, Tensor | None]] = []
        self.scale = 1.0  # the guidance of the last call

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        a = float((1 + sigma**2) ** -0.5)
        s = float(sigma) * a
        t = x.new_full(x.shape[:1], float(self.diffusion.schedule.t_at(sigma)))
        self.scale = self.guidance(sigma) if callable(self.guidance) else self.guidance

        def predict(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return self.diffusion.to_x0(self.net(x_t, t, y).float(), x_t, a, s).clamp(-1, 1)

        y, x_t, difference = self.labels, x * a, None
        if y is None or self.scale in (0, 1):
            x0_hat = predict(x_t, t, None if self.scale == 0 else y)
        else:
            both = torch.cat([y, torch.full_like(y, self.net.num_classes)])
            x0_hat, unconditional = predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            difference = x0_hat - unconditional
        self.calls = [*self.calls[-1:], (x0_hat, difference)]
        x0_hat = self._guided(x0_hat, difference).clamp(-1, 1)
        if self.watch:
            self.watch(x, sigma, x0_hat)
        return x0_hat

    def change(self) -> Tensor:
        """The change of the prediction between the last two calls.

        Both predictions use the guidance of the last call, or none if either call was unguided.
        What a multistep sampler extrapolates then does not jump where guidance starts or ends.
        """
        (before, difference_before), (after, difference) = self.calls
        if difference is None or difference_before is None:
            return after - before
        return self._guided(after, difference) - self._guided(before, difference_before)

    def _guided(self, x0_hat: Tensor, difference: Tensor | None) -> Tensor:
        return x0_hat if difference is None else x0_hat + (self.scale - 1) * difference

"""The noise schedule in float64: how much signal and how much noise there is at each timestep.

The same noising is written in two ways. Networks see the "variance preserving" (VP) form:
    x_t = sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps     (Ho et al. 2020, eq. 4)
Samplers integrate in the "variance exploding" (VE) form, because there the noise level sigma is
the only variable (Karras et al. 2022, table 1):
    x_t / sqrt(alpha_bar_t) = x_0 + sigma_t * eps,     sigma_t^2 = (1 - alpha_bar_t) / alpha_bar_t
"""

import math
from collections.abc import Callable

import torch


def cosine_alpha_bar(timesteps: int) -> torch.Tensor:
    """alpha_bar_t, t = 0..T-1, falling along a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
    s = 0.008
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)  # as in the paper: keeps alpha_bar above 0
    return torch.cumprod(1 - betas, dim=0)


def linear_alpha_bar(timesteps: int) -> torch.Tensor:
    """alpha_bar_t, t = 0..T-1, for betas rising linearly (Ho et al. 2020, section 4).

    Their 1e-4 to 0.02 are for T = 1000. Scaling betas by 1000 / T gives the same final noise level.
    """
    scale = 1000 / timesteps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def loglinear_alpha_bar(timesteps: int) -> torch.Tensor:
    """alpha_bar_t, t = 0..T-1, for log sigma rising linearly.

    That is a linear gamma(t) in Kingma et al. 2021, eq. 3. It is for likelihoods: it starts far
    below the distance between grey levels, 2/255, so at the lowest level every pixel is certain.
    """
    low, high = (math.log10(sigma) for sigma in LOGLINEAR)
    sigmas = torch.logspace(low, high, timesteps, dtype=torch.float64)
    return 1 / (1 + sigmas**2)


TensorMap = Callable[[torch.Tensor], torch.Tensor]

LOGLINEAR = (0.001, 100.0)  # the lowest and highest sigma of loglinear_alpha_bar
SIGMA_START = 20.0  # where spacings in sigma start; images in [-1, 1] are visible only below it

# for a distilled network's later calls: the level it is trained to refine at, and the lowest one
FEW_STEP_LEVELS = (1.5, 1.25)

ALPHA_BARS: dict[str, Callable[[int], torch.Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
    "loglinear": loglinear_alpha_bar,
}


class NoiseSchedule:
    """T noise levels, from nearly clean (t = 0) to nearly pure noise (t = T - 1).

    Attributes:
        timesteps: T.
        alpha_bar: (T,) float64, strictly falling in (0, 1).
        sigmas: (T,) float64, strictly rising; the VE noise levels.
    """

    def __init__(self, name: str, timesteps: int):
        self.timesteps = timesteps
        self.alpha_bar = ALPHA_BARS[name](timesteps)
        self.sigmas = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        self._log_sigmas = self.sigmas.log()

    def sigma_at(self, t: torch.Tensor) -> torch.Tensor:
        """sigma at a timestep in [0, T - 1], log-linear between integer ones. float64."""
        t = t.to(torch.float64)
        low = t.floor().long().clamp(0, self.timesteps - 2)
        return torch.lerp(self._log_sigmas[low], self._log_sigmas[low + 1], t - low).exp()

    def t_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """The inverse of `sigma_at`: fractional timestep in [0, T - 1]; other levels clamp."""
        log_sigma = sigma.to(torch.float64).log()
        high = torch.searchsorted(self._log_sigmas, log_sigma).clamp(1, self.timesteps - 1)
        low_log, high_log = self._log_sigmas[high - 1], self._log_sigmas[high]
        fraction = ((log_sigma - low_log) / (high_log - low_log)).clamp(0, 1)
        return high - 1 + fraction

    def sampling_sigmas(self, steps: int, spacing: str = "linear") -> torch.Tensor:
        """(steps + 1,) float64, strictly falling: sigma_{T-1}, ..., sigma_0, 0; 1 <= steps <= T.

        `spacing` is one of SPACINGS. A sampler first calls the network at the highest level, where
        the denoiser gives the mean of the data, and last at the lowest level that the network was
        trained on: stopping higher leaves faint noise in pixels that should be black. Distilled
        networks are the only exception, see `fewstep`.
        """
        return torch.cat([SPACINGS[spacing](self, steps), torch.zeros(1, dtype=torch.float64)])


def linear(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Evenly spaced in t, at levels seen in training (Nichol & Dhariwal 2021, section 4)."""
    t = torch.linspace(schedule.timesteps - 1, 0, steps, dtype=torch.float64)
    return schedule.sigmas[t.round().long()]


def quadratic(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Evenly spaced in the square root of t (Song et al. 2021, appendix D.2)."""
    share = torch.linspace(1, 0, steps, dtype=torch.float64)
    return schedule.sigma_at((schedule.timesteps - 1) * share**2)


def below_first_call(
    schedule: NoiseSchedule, steps: int, to: TensorMap, back: TensorMap
) -> torch.Tensor:
    """sigma_{T-1}, then `steps - 1` levels from SIGMA_START to sigma_0, even in `to(sigma)`.

    The first call finds the mean of the data. Starting directly at SIGMA_START would require it:
    pure noise there is off by |mean| / sigma standard deviations, and that affects which digits
    are drawn, because the brightest and darkest ones are decided first.
    """
    falling = torch.linspace(0, 1, steps - 1, dtype=torch.float64).flip(0)  # a single value is 0
    high, low = to(schedule.sigmas[-2].clamp(max=SIGMA_START)), to(schedule.sigmas[0])
    return torch.cat([schedule.sigmas[-1:], back(torch.lerp(low, high, falling))])


def karras(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Evenly spaced in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    return below_first_call(schedule, steps, lambda sigma: sigma ** (1 / 7), lambda root: root**7)


def logsnr(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """Evenly spaced in log sigma (Lu et al. 2022)."""
    return below_first_call(schedule, steps, torch.log, torch.exp)


def fewstep(schedule: NoiseSchedule, steps: int) -> torch.Tensor:
    """sigma_{T-1}, then `steps - 1` levels from FEW_STEP_LEVELS[0] down, even in log sigma.

    For networks whose first call already draws an image, which later calls refine. They are never
    called at sigma_0. With two or more later calls, the last one is at FEW_STEP_LEVELS[1].
    """
    high = schedule.sigmas[-2].clamp(max=FEW_STEP_LEVELS[0])
    low = schedule.sigmas[0].clamp(min=FEW_STEP_LEVELS[1])
    falling = torch.linspace(0, 1, max(steps - 1, 2), dtype=torch.float64)[: steps - 1]
    return torch.cat([schedule.sigmas[-1:], torch.lerp(high.log(), low.log(), falling).exp()])


SPACINGS: dict[str, Callable[[NoiseSchedule, int], torch.Tensor]] = {
    "linear": linear,
    "quadratic": quadratic,
    "karras": karras,
    "logsnr": logsnr,
    "fewstep": fewstep,
}

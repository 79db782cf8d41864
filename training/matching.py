"""Distribution matching with a critic, the second part of a distillation."""

import torch
from torch import Tensor, nn

from config import TrainConfig
from models.layers import NoisePredictor
from models.trained import TrainedModel
from training import distillation
from training.distillation import Critic, column
from training.optimization import Optimization, learning_rate
from training.tuning import Draws, Phase, copy_of, descend
from utils.device import autocast

STUDENT_RATE, FAKE_RATE = 0.3, 0.6  # times --lr; the fake has to follow the student
LEAST_RATE = 0.1  # times --lr: fake and critic learn to the end, but the student's rate falls to 0
BETAS = (0.0, 0.999)  # of Adam: no momentum, because the target moves (Yin et al. 2024b)
CRITIC_WEIGHT = 0.5  # of the critic's gradient; that of the scores has weight 1
T_RANGE = (0.01, 0.98)  # of t / T: nothing is learnt at the ends (Yin et al. 2024, section 3.2)
# A tenth of the images get noise from the lowest fifth of t; otherwise faint grey would go unseen.
LOW_SHARE, LOW_PART = 0.1, 0.2
WHITEST = 2.0  # a bound for runaway values, not for images


class Matching(Phase):
    """Distribution matching distillation (Yin et al. 2024, DMD), with a critic (2024b, DMD2).

    The student draws half of each batch in one call and half in two, and noise is added to these
    images. Two networks denoise them: the teacher, and a fake that keeps learning from the
    student's images only. Where the two differ, the student draws such images too often or too
    rarely. The critic compares the images with real ones (Sauer et al. 2024, LADD), so it sees
    what the teacher does not know.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        teacher: TrainedModel,
        student: NoisePredictor,
        generator: torch.Generator,
    ):
        super().__init__(cfg, teacher, optimization(student, cfg, cfg.ema_length), generator)
        fake = copy_of(teacher.net)
        fake.tell_apart(2)  # first and second calls, whose errors could otherwise cancel
        image = torch.zeros(1, *teacher.data.shape, device=teacher.device)
        with torch.no_grad(), teacher.net.watched() as maps:
            teacher.net(image, image.new_zeros(1))
        critic = Critic([values.shape[1] for values in maps]).to(teacher.device)
        self.fake, self.critic = optimization(fake, cfg), optimization(critic, cfg)
        self.top, self.again = self.schedule.sampling_sigmas(2, "fewstep")[:2]

    def step(self, x0: Tensor, y: Tensor | None, progress: float) -> tuple[Tensor, Tensor]:
        """Take one step of all three networks on the batch of all processes.

        `progress` is that of the phase. Returns how far teacher and fake are apart, and the norm
        of the student's gradient. The gradient at the images has a fixed size.
        """
        draws = Draws(self.generator, x0.shape)
        x0, y = x0[draws.part], None if y is None else y[draws.part]
        second = (torch.arange(draws.shape[0]) % 2 == 1)[draws.part]
        rate = learning_rate(self.cfg.lr, progress)
        follow = max(rate, LEAST_RATE * self.cfg.lr)
        raw = self.drawn(draws, y, second)
        x, told = raw.detach().clamp(-1, WHITEST), second.to(x0.device)
        kinds = told * (self.student.num_classes + 1) + (0 if y is None else y)
        descend(self.fake, self.fake_loss(draws, x, kinds), FAKE_RATE * follow)
        gradient, opposed, gap = self.gradients(draws, x, x0, y, told, kinds)
        descend(self.critic, opposed, follow)
        pull = distillation.pull(raw, distillation.through_clamp(gradient, raw))
        return gap, descend(self.optimization, pull, STUDENT_RATE * rate)

    def drawn(self, draws: Draws, y: Tensor | None, second: Tensor) -> Tensor:
        """The student's images, not clamped. Of two calls, only the last can be differentiated."""
        start, fresh = draws.noise(), draws.noise()
        x0 = torch.zeros_like(start)
        if second.any():
            labels = None if y is None else y[second]
            top = self.top.expand(int(second.sum()))
            with torch.no_grad():
                once = self.denoised(self.student, x0[second], start[second], top, labels)
            x0[second] = once.clamp(-1, 1)
        eps = torch.where(column(second).to(start.device), fresh, start)
        return self.denoised(self.student, x0, eps, torch.where(second, self.again, self.top), y)

    def fake_loss(self, draws: Draws, x: Tensor, kinds: Tensor) -> Tensor:
        """The loss of denoising images x, at all noise levels; blacker than black is no error."""
        sigma = self.schedule.sigmas[(self.schedule.timesteps * draws.stratified()).long()]
        x0_hat = self.denoised(self.fake.net, x, draws.noise(), sigma, kinds)
        error = (x0_hat - x).masked_fill(distillation.beyond_black(x0_hat, x), 0.0)
        weight = column((1 + sigma**-2).to(x))  # as for an error in v
        return (weight * error.square()).mean()

    def gradients(
        self,
        draws: Draws,
        x: Tensor,
        real: Tensor,
        y: Tensor | None,
        second: Tensor,
        kinds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient at images x, the critic's loss, and how far teacher and fake are apart."""
        sigma, eps, net = self.draw_levels(draws), draws.noise(), self.teacher.net
        at = x.clone().requires_grad_()
        with net.watched() as maps:
            teacher = self.denoised(net, at, eps, sigma, y).detach().clamp(min=-1)
        with torch.no_grad(), net.watched() as real_maps:
            self.denoised(net, real, draws.noise(), sigma, y)
        with torch.no_grad():
            fake = self.denoised(self.fake.net, x, eps, sigma, kinds).clamp(min=-1)
        scores = distillation.distribution_gradient(x, teacher, fake)
        liked = torch.stack([values.mean() for values in self.opinions(maps, second)]).mean()
        (dislike,) = torch.autograd.grad(-liked, at)
        maps = [values.detach() for values in maps]
        opposed = distillation.hinge(self.opinions(real_maps, second), self.opinions(maps, second))
        gradient = distillation.unit(scores) + CRITIC_WEIGHT * distillation.unit(dislike)
        return gradient, opposed, (teacher - fake).abs().mean()

    def opinions(self, maps: list[Tensor], second: Tensor) -> list[Tensor]:
        with autocast(self.teacher.device, self.cfg.precision):
            return self.critic.net(maps, second)

    def draw_levels(self, draws: Draws) -> Tensor:
        """Noise levels sigma at which the student's images are judged."""
        low, high = T_RANGE
        share = low + (high - low) * draws.stratified()
        share = torch.where(draws.uniform() < LOW_SHARE, LOW_PART * draws.uniform(), share)
        return self.schedule.sigmas[(self.schedule.timesteps * share).long()]

    def state(self) -> dict:
        return {**super().state(), "fake": self.fake.state(), "critic": self.critic.state()}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.fake.load_state(state["fake"])
        self.critic.load_state(state["critic"])


def optimization(net: nn.Module, cfg: TrainConfig, ema_length: float | None = None) -> Optimization:
    """AdamW, which keeps a network and its adversary in step better than Muon does."""
    adam = torch.optim.AdamW(net.parameters(), betas=BETAS, weight_decay=cfg.weight_decay)
    return Optimization(net, [adam], grad_clip=cfg.grad_clip, ema_length=ema_length)

import pytest
import torch

from config import TrainConfig, UserError
from models import build_diffusion
from models.trained import TrainedModel
from scoring import diffusion_classifier
from scoring.diffusion_classifier import denoising_errors
from utils.data_loader import DatasetInfo

DATA = DatasetInfo("synthetic", 1, 4, 4, ("dark", "grey", "light"), (0.2, 0.3, 0.5))
GREY = torch.tensor([-0.6, 0.2, 0.8])  # of an image of each class


class Plain(torch.nn.Module):
    """Takes every image for one of its label's grey; or, if blind, for what it sees."""

    num_classes = 3

    def __init__(self, blind=False):
        super().__init__()
        self.weight, self.blind = torch.nn.Parameter(torch.zeros(1)), blind

    def forward(self, x_t, t, y):
        return x_t if self.blind else GREY[y].view(-1, 1, 1, 1).expand_as(x_t)


def model(net, **settings):
    cfg = TrainConfig(prediction="x0", timesteps=20, **settings)
    return TrainedModel(cfg, DATA, build_diffusion(cfg), net)


def images(count):
    return torch.randint(256, (count, *DATA.shape), generator=torch.Generator().manual_seed(3)).to(
        torch.uint8
    )


def test_the_error_of_a_denoiser_that_says_one_image_a_label():
    """eps - eps_hat is (x0_hat - x0) / sigma, whatever the noise."""
    shown, levels = images(5), (0.5, 2.0)
    x0 = shown.double() / 127.5 - 1
    square = (x0.flatten(1)[:, None] - GREY[:, None].double()).square().sum(dim=2)  # (5, 3)
    expected = square * (1 / 0.5**2 + 1 / 2.0**2) / 2
    got = denoising_errors(model(Plain()), shown, levels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_all_labels_meet_the_same_noise_and_all_images_their_own(monkeypatch):
    errors = denoising_errors(model(Plain(blind=True)), images(7))
    assert (errors == errors[:, :1]).all() and len(errors.unique()) == 7
    monkeypatch.setattr(diffusion_classifier, "sampling_batch", lambda device: 6)  # two images
    torch.testing.assert_close(denoising_errors(model(Plain(blind=True)), images(7)), errors)
    assert (denoising_errors(model(Plain(blind=True)), images(7), seed=1) != errors).all()


def test_probabilities_find_the_label():
    shown = ((GREY + 1) * 127.5).round().to(torch.uint8).view(3, 1, 1, 1).expand(-1, *DATA.shape)
    found = diffusion_classifier.diffusion_classifier(model(Plain()), shown)
    assert found.argmax(dim=1).tolist() == [0, 1, 2]
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_networks_that_cannot_tell_are_refused():
    unlabelled = Plain()
    unlabelled.num_classes = 0
    with pytest.raises(UserError, match="without labels"):
        denoising_errors(model(unlabelled), images(1))
    with pytest.raises(UserError, match="distilled"):
        denoising_errors(model(Plain(), teacher="unet.pth"), images(1))

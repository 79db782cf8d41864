import pytest
import torch

from config import TrainConfig
from models import MODELS, build_model
from models.layers import Stem, timestep_embedding
from tests.conftest import DIGITS
from utils.data_loader import DatasetInfo


def busy(cfg):
    """A network whose zero-initialised layers have been woken up."""
    torch.manual_seed(0)
    net = build_model(cfg, DIGITS)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 28, 28, generator=generator), torch.tensor([0.0, 5.5, 299.0])


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("width", [4, 7, 20, 33])
def test_any_width_predicts_zero_at_first(model_type, width, batch):
    net = build_model(TrainConfig(model_type=model_type, width=width), DIGITS)
    out = net(*batch)
    assert out.shape == batch[0].shape and not out.any()


@pytest.mark.parametrize("model_type", MODELS)
def test_the_prediction_depends_on_t(model_type, batch):
    net = busy(TrainConfig(model_type=model_type, width=16))
    x, t = batch
    assert (net(x, t) - net(x, t + 30)).abs().mean() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_labels_and_the_null_label(model_type, batch):
    net = busy(TrainConfig(model_type=model_type, width=16, class_conditional=True))
    x, t = batch
    null = torch.full((3,), net.num_classes)
    torch.testing.assert_close(net(x, t, None), net(x, t, null))
    assert (net(x, t, torch.tensor([1, 1, 1])) - net(x, t, null)).abs().mean() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_an_unconditional_network_takes_no_label(model_type, batch):
    cfg = TrainConfig(model_type=model_type, width=16, class_conditional=False)
    net = build_model(cfg, DIGITS)
    with pytest.raises(ValueError, match="unconditional"):
        net(*batch, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("model_type", MODELS)
def test_every_pixel_can_see_every_other(model_type):
    """A corner of the output must depend on the far corner of the input."""
    net = busy(TrainConfig(model_type=model_type, width=16))
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    net(x, torch.tensor([10.0]))[0, 0, 0, 0].backward()
    assert x.grad[0, 0, -2:, -2:].abs().max() > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_every_parameter_learns(model_type, batch):
    net = busy(TrainConfig(model_type=model_type, width=16, class_conditional=True))
    net(*batch, torch.tensor([1, 2, 10])).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_timestep_embedding_tells_neighbours_apart():
    e = timestep_embedding(torch.arange(300.0), 64)
    assert e.shape == (300, 64)
    distance = torch.cdist(e, e) + torch.eye(300) * 9
    assert distance.min() > 0.1


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 24), (3, 4, 64)])
def test_images_of_any_size_and_colour(model_type, shape):
    data = DatasetInfo("folder", *shape, ("a", "b", "c"), (0.2, 0.3, 0.5))
    net = build_model(TrainConfig(model_type=model_type, width=8), data)
    assert net.num_classes == 3
    x = torch.randn(2, *shape)
    assert net(x, torch.tensor([0.0, 9.0]), torch.tensor([2, 3])).shape == x.shape
    assert build_model(TrainConfig(), DatasetInfo("folder", *shape, (), ())).num_classes == 0


@pytest.mark.parametrize("model_type", MODELS)
def test_a_network_says_which_of_its_parts_are_outer(model_type):
    """They exist, and are what meets images, labels and predictions."""
    net = build_model(TrainConfig(model_type=model_type, width=8), DIGITS)
    sizes = {tuple(net.get_submodule(name).weight.shape)[:2] for name in net.outer}
    assert sizes == {(8, 4), (4, 8), (11, 16)}


@pytest.mark.parametrize("model_type", MODELS)
def test_waves_are_more_inputs_of_the_stem_and_change_no_other_shape(model_type, batch):
    plain = build_model(TrainConfig(model_type=model_type, width=8), DIGITS)
    net = busy(TrainConfig(model_type=model_type, width=8, fourier=3))
    differing = {k for k, v in net.state_dict().items() if v.shape != plain.state_dict()[k].shape}
    assert differing == {"stem.weight"} and net.stem.in_channels == 4 * 7
    assert net(*batch).shape == batch[0].shape


def test_waves_tell_neighbouring_grey_levels_apart():
    """Half a grey level turns the first wave round, and a whole one is its period."""
    stem, grey = Stem(1, 1, fourier=2), torch.zeros(1, 1, 2, 2)
    with torch.no_grad():
        stem.weight.zero_()[:, 8:12, 1, 1] = 1  # the four pixels' cosine of the first wave
        stem.bias.zero_()
    assert stem(grey).item() == pytest.approx(4)
    assert stem(grey + 1 / 255).item() == pytest.approx(-4, abs=1e-3)
    assert stem(grey + 2 / 255).item() == pytest.approx(4, abs=1e-3)

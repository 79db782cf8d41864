import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training.muon import Muon, orthogonalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 16, 40), (1, 40, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator)
    found = orthogonalize(1e-3 * matrices, dtype)  # whatever their size
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    _, values, _ = torch.linalg.svd(found, full_matrices=False)
    assert found.shape == shape and found.dtype == torch.float32
    assert values.min() > 0.3 and values.max() < 1.3
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), (u @ vh).flatten(1))
    assert (cosine > 0.95).all()


@pytest.mark.parametrize("norm", [1.0, 1e-7])
def test_singular_values_go_through_the_polynomial_of_jordan_et_al_five_times(norm):
    """As shares of the norm, to which 1e-7 is added: a matrix of zeros stays one."""
    shares = torch.nn.functional.normalize(torch.tensor([0.8, 0.6, 0.05, 0.0]), dim=0)
    expected = shares * norm / (norm + 1e-7)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    found = orthogonalize((norm * shares).diag()[None])
    torch.testing.assert_close(found[0], expected.diag(), atol=1e-5, rtol=0)


def test_products_are_of_the_shorter_side():
    """A tall matrix costs what its transpose does, and is the transpose of what that gives."""
    wide = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(0))
    costs, found = [], []
    for matrix in (wide, wide.mT):
        with FlopCounterMode(display=False) as counter:
            found.append(orthogonalize(matrix))
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] > 0
    assert torch.equal(found[0], found[1].mT)


def test_the_first_step_is_the_orthogonal_matrix_at_the_size_of_an_adamw_step():
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    p = torch.nn.Parameter(torch.zeros(6, 6))
    p.grad = 1000 * u
    Muon([p], lr=0.1, weight_decay=0.0).step()
    cosine = -(p.detach() * u).sum() / (p.detach().norm() * u.norm())
    assert cosine > 0.99
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)


def test_weight_decay_is_decoupled_from_the_gradient():
    weights = [torch.nn.Parameter(torch.full((4, 3, 3, 3), 2.0)) for _ in range(2)]
    gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    for p, decay in zip(weights, (0.0, 0.5), strict=True):
        p.grad = gradient.clone()
        Muon([p], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(weights[0] - weights[1], torch.full((4, 3, 3, 3), 0.1))


def test_weights_of_one_shape_do_not_influence_each_other():
    gradients = torch.randn(3, 5, 2, 3, 3, generator=torch.Generator().manual_seed(3))

    def after(chosen):
        params = [torch.nn.Parameter(torch.zeros(5, 2, 3, 3)) for _ in chosen]
        optimizer = Muon(params, lr=0.1, weight_decay=0.0)
        for _ in range(3):
            for p, k in zip(params, chosen, strict=True):
                p.grad = gradients[k].clone()
            optimizer.step()
        return params[0]

    torch.testing.assert_close(after([0]), after([0, 1, 2]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_step_on_the_device_is_a_step(memory):
    """Of convolutions wide, tall and 1x1, and of plain matrices, some of them alike."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (40, 2, 3, 3), (16, 8, 1, 1), (16, 8), (5, 30)]

    def weights():
        generator.manual_seed(4)
        found = [torch.randn(shape, generator=generator) for shape in shapes]
        found = [p.to(memory_format=memory) if p.ndim == 4 else p for p in found]
        return [torch.nn.Parameter(p) for p in found]

    ours, theirs = weights(), weights()
    on_device, plain = Muon(ours, lr=0.0, weight_decay=0.1), Muon(theirs, lr=0.1, weight_decay=0.1)
    on_device.param_groups[0]["lr"] = torch.tensor(0.1)
    for k in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        on_device.found_inf = torch.zeros(())
        on_device.step()
        plain.step()
        for p in ours:
            p.grad = torch.full_like(p, float("nan") if k % 2 else float("inf"))
        on_device.found_inf = torch.ones(())
        on_device.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            on_device.state[p]["momentum"], plain.state[q]["momentum"], atol=1e-6, rtol=1e-5
        )

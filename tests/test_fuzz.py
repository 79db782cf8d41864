"""A checkpoint of a stranger: whatever was done to it, it loads correctly or is refused."""

import io
import os
import random

import torch

from config import UserError
from models.trained import load_trained
from tests.fuzz_images import mutate_bytes, peak_memory

MUTATIONS = int(os.environ.get("MUTATIONS", 300))


def strange_value(rng: random.Random):
    huge = torch.zeros(1).expand(rng.choice([10**6, 10**12]), 10**3)  # one number, seen often
    return rng.choice(
        [None, -1, 10**400, float("nan"), "x" * 1000, [], {}, {"a": 1}, b"\0", huge, torch.ones(2)]
        + [torch.full((3, 3), float("inf")), torch.zeros(2, dtype=torch.int8), True, [[[]]]]
    )


def mutate_values(values: dict, rng: random.Random) -> bytes:
    """Drop an entry, add one, or give one a strange value: at the top, in config, data or ema."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    inside = rng.choice([values, values["config"], values["data"], values["ema"]])
    key = rng.choice(list(inside))
    kind = rng.randrange(4)
    if kind == 0:
        del inside[key]
    elif kind == 1:
        inside[rng.choice(["colour", "", 3])] = strange_value(rng)
    elif kind == 2 and isinstance(inside[key], torch.Tensor):
        w = inside[key]
        inside[key] = rng.choice(
            [w.double(), w.int(), w[:0], w.unsqueeze(0), w.flatten(), w * float("nan"), w.t()]
            if w.ndim == 2
            else [w.half(), w.bool(), w.unsqueeze(0), w + float("inf"), w.to(torch.complex64)]
        )
    else:
        inside[key] = strange_value(rng)
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def test_mutated_checkpoints_are_loaded_or_refused(tiny_checkpoint, own_folder):
    path = tiny_checkpoint()
    data, values = path.read_bytes(), torch.load(path, weights_only=True)
    target = own_folder / "mutated.pth"
    rng, loaded, refused = random.Random(0), 0, 0
    x, t = torch.zeros(1, 1, 28, 28), torch.zeros(1)
    before = peak_memory()
    for k in range(MUTATIONS):
        target.write_bytes(mutate_bytes(data, rng) if k % 2 else mutate_values(values, rng))
        try:
            net = load_trained(target, "cpu").net
            assert net(x, t).isfinite().all()
            if k % 2:  # of damaged bytes, only those matter not that hold no value
                assert all(
                    torch.equal(w, values["ema"][name]) for name, w in net.state_dict().items()
                )
            loaded += 1
        except UserError as error:
            assert str(error).startswith(f"--checkpoint {target}") and len(str(error)) < 600
            refused += 1
    grown = peak_memory() - before
    assert loaded + refused == MUTATIONS and loaded > 2 and refused > MUTATIONS / 2
    assert grown < 2**30

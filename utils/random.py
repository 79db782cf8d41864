"""Random numbers: streams that never meet, and noise with the same bits on every device.

The noise and the labels of images are counter-based: number n of a stream is a function of n, so
any part of a stream can be drawn directly, by itself, on any device. The function is Philox4x64-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The CPU uses numpy's, written
in C. CUDA uses our own kernel, which gives the same words. Other devices get what the CPU draws.
"""

import functools
import hashlib
import math
from enum import IntEnum

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are for. Different purposes get unrelated numbers."""

    WEIGHTS = 0
    ORDER = 1
    NOISE = 2
    SAMPLES = 3
    LABELS = 4
    DATA = 5


# Word i of the stream that `words` describes. Every T is int64_t. A thread computes the four words
# of a block and keeps one: on a GPU this costs little, and it keeps the code short.
PHILOX = """
template <typename T> T philox(T i, T step, T seed, T stream) {
    unsigned long long c[4] = {(unsigned long long)i / 4, (unsigned long long)step, 0, 0};
    unsigned long long k[2] = {(unsigned long long)seed, (unsigned long long)stream};
    for (int turn = 0; turn < 10; turn++) {
        unsigned long long high0 = __umul64hi(0xD2E7470EE14C6C93, c[0]);
        unsigned long long high1 = __umul64hi(0xCA5A826395121157, c[2]);
        unsigned long long low0 = 0xD2E7470EE14C6C93 * c[0], low1 = 0xCA5A826395121157 * c[2];
        c[0] = high1 ^ c[1] ^ k[0]; c[1] = low1;
        c[2] = high0 ^ c[3] ^ k[1]; c[3] = low0;
        k[0] += 0x9E3779B97F4A7C15; k[1] += 0xBB67AE8584CAA73B;
    }
    return i % 4 < 2 ? (i % 2 ? c[1] : c[0]) : (i % 2 ? c[3] : c[2]);
}"""


@functools.cache
def cuda_philox():
    """The kernel, compiled at its first call by the NVRTC that comes with torch."""
    return torch.cuda.jiterator._create_jit_fn(PHILOX, step=0, seed=0, stream=0)


def words(stream: int, seed: int, first: int, count: int, *, step: int = 0, device="cpu") -> Tensor:
    """Words number first, first + 1, ... of a stream: (count,) int64, each of 64 random bits.

    Philox maps a counter of four words to a block of four words, using a key of two words. Words 4n
    to 4n + 3 are the block for counter (n, step, 0, 0) and key (seed, stream), both written lowest
    word first. 0 <= seed < 2^63; no two seeds, streams, steps or n share both counter and key.
    """
    device = torch.device(device)
    if device.type == "cuda":
        numbers = torch.arange(first, first + count, device=device)
        return cuda_philox()(numbers, step=step, seed=seed, stream=int(stream))
    counter = ((step << 64) + first // 4 - 1) % 2**256  # numpy increments it before drawing
    philox = np.random.Philox(counter=counter, key=np.array([seed, stream], dtype=np.uint64))
    raw = philox.random_raw(first % 4 + count)[first % 4 :]
    return torch.from_numpy(raw.view(np.int64)).to(device)


CHUNK = 2**14  # words: few enough for torch to use one thread, so no thread waits on a busy CPU


@functools.cache
def quantile_lines(device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and slopes (65536,) float32 of the lines that `normal` evaluates.

    Each line covers the float32 numbers f that share their first 16 bits: sign, exponent and seven
    bits of the mantissa. It is the least-squares fit to -ndtri(|f| / 2^32) there, with the sign of
    f: it meets the curve at the two Gauss-Legendre points. It is 0 at |f| = 2^31, the largest |f|.
    """
    index = np.arange(127 << 7, 158 << 7, dtype=np.int32)  # of 1 <= f < 2^31
    low, high = ((index + k << 16).view(np.float32).astype(np.float64) for k in (0, 1))
    left, right = ((low + high + side * (high - low) / 3**0.5) / 2 for side in (-1, 1))
    slope = (ndtri(left / 2**32) - ndtri(right / 2**32)) / (right - left)
    offset = -ndtri(left / 2**32) - slope * left
    lines = np.zeros((2, 2**16), np.float32)
    lines[:, index] = offset, slope
    lines[:, index + 2**15] = -offset, slope
    return tuple(torch.from_numpy(lines).to(device))


def normal(raw: Tensor) -> Tensor:
    """Words (N,) int64 -> standard normal (2N,) float32, on their device.

    Each half of a word, the lower one first, becomes an odd signed number w. Its z has the sign of
    w, and a normal number exceeds |z| in magnitude with probability |w| / 2^31. This quantile
    function is piecewise linear, within 3e-6 of the true one up to the largest |z|, 6.23.

    Different devices round logarithms and cosines differently. This uses only a conversion, a
    product and a sum, which IEEE 754 defines to the bit. Each is a separate operation, so that none
    is fused with another.
    """
    if raw.is_cpu and len(raw) > CHUNK:
        return torch.cat([normal(part) for part in raw.split(CHUNK)])
    f = (raw.view(torch.int32) | 1).float()
    index = (f.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    offset, slope = quantile_lines(f.device)
    return slope.index_select(0, index).mul_(f).add_(offset.index_select(0, index))


class ImageNoise:
    """Standard normal noise for consecutive images, step by step.

    A pixel's noise depends only on the seed, the number of the image, the step and the position of
    the pixel, not on the device, the batch or the process.

    Attributes:
        step: the step that the next call draws; set it to jump to another step.
    """

    def __init__(self, seed: int, numbers: range, shape: tuple[int, ...], device="cpu"):
        """For images `numbers`, a range of step 1, each of `shape`; 0 <= seed < 2^63."""
        self.seed, self.numbers, self.shape, self.device = seed, numbers, shape, device
        self.step = 0

    def __call__(self) -> Tensor:
        """The noise of the next step, (len(numbers), *shape) float32."""
        size, count = math.prod(self.shape), len(self.numbers)
        each = 4 * -(-size // 8)  # words per image: whole blocks, of eight normals each
        where = (self.numbers.start * each, count * each)
        raw = words(Stream.SAMPLES, self.seed, *where, step=self.step, device=self.device)
        self.step += 1
        return normal(raw).view(count, 2 * each)[:, :size].reshape(count, *self.shape)


def draw_labels(seed: int, numbers: range, shares: Tensor) -> Tensor:
    """Classes (len(numbers),) int64 of images `numbers`, drawn with weights `shares` (classes,).

    Label k of a seed does not depend on the range. Shares are >= 0 and need not sum to 1.
    """
    bits = words(Stream.LABELS, seed, numbers.start, len(numbers)).numpy().view(np.uint64)
    uniform = (bits >> 11) * 2.0**-53
    upto = np.cumsum(np.asarray(shares, dtype=np.float64))
    return torch.from_numpy(np.searchsorted(upto / upto[-1], uniform, side="right"))


def generator(stream: int, seed: int, *keys: int, device="cpu") -> torch.Generator:
    """A generator for a seed and any number of keys, all integers of any size.

    Any change, even one more key, gives an unrelated stream: all are hashed to 256 bits. On a CPU
    it continues like numpy's MT19937 seeded with these bits; elsewhere 64 of them are the seed.
    """
    name = repr((int(stream), int(seed), *map(int, keys))).encode()
    digest = int.from_bytes(hashlib.sha256(name).digest(), "little")
    made = torch.Generator(device).manual_seed(digest % 2**64)
    if made.device.type == "cpu":  # its Mersenne Twister uses 32 bits of a seed; numpy's uses all
        state = made.get_state()
        key = np.random.MT19937(digest).state["state"]["key"]
        state.view(torch.int64)[3:627] = torch.from_numpy(key.astype(np.int64))
        made.set_state(state)
    return made


def random_order(total: int, seed: int) -> Tensor:
    """The numbers below `total` in an order fixed by `seed`, to pick images at random.

    The first images of a file would not do: files are often sorted by class.
    """
    return torch.randperm(total, generator=generator(Stream.ORDER, seed))

"""Seeds made of words, and random numbers that belong to one image of one step."""

from __future__ import annotations

import hashlib
import math

import torch


def seed_for(*words) -> int:
    """A seed that depends on these words alone, so that any step can be repeated by itself."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7], "big")


class Draws:
    """Random numbers of a batch, every row of them a function of (seed, step, its index) alone.

    A row does not depend on the size of the batch, nor on how it is split over processes and
    micro-batches, so the same images get the same times, noise, flips and dequantisation however
    many processes train. Each kind of number has a stream of its own, named by `stream`.

    The j-th word of a row is a hash of j and of two 64-bit keys of (seed, step, stream, row):
    integer arithmetic on the whole batch, the same on every device, with no generator's state and
    nothing sent to the device. Normal numbers are made of a word's halves (Box & Muller 1958), and
    agree between devices to rounding.

    Args:
      seed: of the run.
      step: of the training.
      first: index in the global batch of this process's first image.
      count: this process's number of images.
      total: size of the global batch; by default `first + count`.
      device: where the numbers are made.
    """

    def __init__(
        self,
        seed: int,
        step,
        first: int,
        count: int,
        total: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.seed, self.step = seed, step
        self.first, self.count, self.total = first, count, total or first + count
        self.device = torch.device(device)

    def rows(self, start: int, stop: int) -> Draws:
        """The numbers of images start to stop − 1 of these, as a micro-batch needs them."""
        if not 0 <= start <= stop <= self.count:
            raise ValueError(f"expected 0 ≤ start ≤ stop ≤ {self.count}, got {start} and {stop}")
        first = self.first + start
        return Draws(self.seed, self.step, first, stop - start, self.total, self.device)

    def indices(self) -> torch.Tensor:
        """Positions of the images in the global batch, (B,)."""
        return torch.arange(self.first, self.first + self.count, device=self.device)

    def shared(self, stream: str) -> float:
        """One number in [0, 1), the same for every image of the step."""
        return seed_for(self.seed, self.step, stream) / 2**56

    def rand(self, stream: str, shape=(), dtype=torch.float32) -> torch.Tensor:
        """Uniform numbers in [0, 1), (B, *shape), of 24 bits, or 53 in float64.

        Of 16 bits they are those of float32, rounded, but never to 1.
        """
        n = math.prod(shape)
        if dtype == torch.float64:
            u = _shifted(self._words(stream, n), 11).double().mul_(2.0**-53)
        else:
            halves = self._words(stream, (n + 1) // 2).view(torch.int32)[:, :n]
            u = (halves >> 8).bitwise_and_(2**24 - 1).float().mul_(2.0**-24).to(dtype)
            if u.dtype != torch.float32:
                u.clamp_(max=1 - torch.finfo(dtype).eps / 2)
        return u.reshape(self.count, *shape)

    def randn(self, stream: str, shape=(), dtype=torch.float32) -> torch.Tensor:
        """Standard normal numbers, (B, *shape), made in float32 whatever the dtype, and within
        ±6.7, beyond which two in 10¹¹ lie."""
        n = math.prod(shape)
        halves = self._words(stream, (n + 1) // 2).view(torch.int32).float()
        # A half is an integer k in [−2³¹, 2³¹): |k| is uniform, and so is the angle π k/2³¹.
        angle = halves[:, 0::2] * (math.pi * 2.0**-31)
        radius = halves[:, 1::2].abs().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
        z = torch.cat([torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)], dim=1)[:, :n]
        return z.reshape(self.count, *shape).to(dtype)

    def randint(self, stream: str, high: int) -> torch.Tensor:
        """Integers 0 to high − 1, (B,)."""
        if high < 1:
            raise ValueError(f"expected integers below high ≥ 1, got high={high}")
        return (self.rand(stream, dtype=torch.float64) * high).long().clamp(max=high - 1)

    def _words(self, stream: str, n: int) -> torch.Tensor:
        """Words of 64 random bits, (B, n) int64: SplitMix64 (Steele, Lea & Flood 2014) of the
        counter, with a second key inside it, since rows that differ by the start of one sequence
        alone would overlap."""
        rows = (self.indices() + 1) * _GOLDEN
        words = (self.seed, self.step, stream)
        first, second = (_mixed(rows + seed_for(*words, i)).unsqueeze(1) for i in ("a", "b"))
        z = torch.empty((self.count, n), dtype=torch.int64, device=self.device)
        torch.add(first, torch.arange(1, n + 1, device=self.device) * _GOLDEN, out=z)
        return _mixed(z, second)


def normal(x: torch.Tensor, draws, stream: str) -> torch.Tensor:
    """z ~ N(0, I) of x's shape and dtype, on its device: the images' own numbers of `stream`, or
    torch's generator's where draws is None.

    Raises: ValueError for draws of another number of images, which would be shared among these.
    """
    if draws is None:
        return torch.randn_like(x)
    z = draws.randn(stream, x.shape[1:]).to(x)
    if z.shape != x.shape:
        raise ValueError(f"expected draws for {len(x)} images, got {len(z)}; use draws.rows")
    return z


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """z >> by of 64 bits without a sign."""
    return (z >> by).bitwise_and_(2 ** (64 - by) - 1)


def _mixed(z: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
    """SplitMix64's one-to-one mixing of 64 bits, in place, with a key put in half way."""
    z.bitwise_xor_(_shifted(z, 30)).mul_(_FACTORS[0])
    z = z if key is None else z.bitwise_xor_(key)
    z.bitwise_xor_(_shifted(z, 27)).mul_(_FACTORS[1])
    return z.bitwise_xor_(_shifted(z, 31))

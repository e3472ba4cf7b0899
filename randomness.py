"""Seeds made of words, and random numbers that belong to one image of one step."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*words) -> int:
    """A seed that depends on these words alone, so that any step can be repeated by itself."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7], "big")


class Draws:
    """Random numbers of a batch, every row of them a function of (seed, step, its index) alone.

    A row does not depend on the size of the batch, nor on how it is split over processes and
    micro-batches, so the same images get the same times, noise, flips and dequantisation however
    many processes train. Each kind of number has a stream of its own, named by `stream`.

    Args:
      seed: of the run.
      step: of the training.
      first: index in the global batch of this process's first image.
      count: this process's number of images.
      total: size of the global batch; by default `first + count`.
      device: where the numbers are made; a GPU makes other ones than the CPU.
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
        self._generator = torch.Generator(self.device)

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
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self._fill(torch.Tensor.uniform_, stream, shape, dtype)

    def randn(self, stream: str, shape=(), dtype=torch.float32) -> torch.Tensor:
        """Standard normal numbers, (B, *shape)."""
        return self._fill(torch.Tensor.normal_, stream, shape, dtype)

    def randint(self, stream: str, high: int) -> torch.Tensor:
        """Integers 0 to high − 1, (B,)."""
        return (self.rand(stream, dtype=torch.float64) * high).long().clamp(max=high - 1)

    def _fill(self, fill, stream: str, shape, dtype) -> torch.Tensor:
        out = torch.empty((self.count, *shape), dtype=dtype, device=self.device)
        base = seed_for(self.seed, self.step, stream)
        for i, row in enumerate(out.reshape(self.count, -1)):
            self._generator.manual_seed(_mix(base, self.first + i))
            fill(row, generator=self._generator)
        return out


def _mix(base: int, index: int) -> int:
    """SplitMix64: seeds of neighbouring images that have nothing in common."""
    z = (base + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63

"""What the hardware can do: the fastest matrix product, the fastest 3×3 convolutions at a network's
own shapes, and the fastest copy, measured here and now."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import seconds
from losses_step import float32_precision

#: (images, channels in, channels out, height, width) of a convolution with stride 1.
Shape = tuple[int, int, int, int, int]
TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Convolutions(TorchDispatchMode):
    """Within this context the dense 3×3 convolutions of stride 1 are counted, by their shapes."""

    def __init__(self):
        super().__init__()
        self.shapes: collections.Counter[Shape] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, _, _, transposed, _, groups = args
            plain = not transposed and groups == 1 and set(stride) == {1}
            if plain and weight.shape[2:] == (3, 3):
                self.shapes[(len(x), x.shape[1], len(weight), x.shape[2], x.shape[3])] += 1
        return func(*args, **(kwargs or {}))


def shapes_of(forward: Callable[[], Any]) -> dict[Shape, int]:
    """How often each 3×3 convolution is made by a forward pass."""
    with torch.no_grad(), Convolutions() as found:
        forward()
    return dict(found.shapes)


def best(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that does not count. Each call is made so
    often that it lasts some milliseconds."""
    work()
    often = max(1, round(5e-3 / seconds(work, device)))

    def many():
        for _ in range(often):
            work()

    return min(seconds(many, device) for _ in range(repeats)) / often


def matmul_peak(dtype: str, device: torch.device) -> float:
    """FLOP/s of the fastest square product of random numbers."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, device=device, dtype=TYPES[dtype]) for _ in range(2))
        rates.append(2 * n**3 / best(lambda a=a, b=b: a @ b, device))
    return max(rates)


def convolution_peak(dtype: str, device: torch.device, shapes: dict[Shape, int]) -> float:
    """FLOP/s of these convolutions by themselves, each in its faster memory format: the work of
    all of them over the time of all of them."""
    work = spent = 0.0
    for (n, c_in, c_out, height, width), often in shapes.items():
        fastest = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, c_in, height, width, device=device, dtype=TYPES[dtype])
            weight = torch.randn(c_out, c_in, 3, 3, device=device, dtype=TYPES[dtype])
            x, weight = x.to(memory_format=layout), weight.to(memory_format=layout)
            fastest = min(
                fastest,
                best(lambda x=x, w=weight: torch.conv2d(x, w, padding=1), device),
            )
        work += often * 2 * 9 * n * c_in * c_out * height * width
        spent += often * fastest
    return work / spent if spent else 0.0


def copy_peak(device: torch.device) -> float:
    """Bytes/s read and written by a copy that no cache holds."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), device)


@torch.no_grad()
def measure(dtypes, device: torch.device, shapes: dict[Shape, int]) -> dict[str, Any]:
    """The peaks of each precision: `matmul` and `conv3x3` in FLOP/s, `copy` in bytes/s."""
    found: dict[str, Any] = {"copy": copy_peak(device)}
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        for dtype in dict.fromkeys(dtypes):
            with float32_precision(dtype, device):
                found[dtype] = {
                    "matmul": matmul_peak(dtype, device),
                    "conv3x3": convolution_peak(dtype, device, shapes),
                }
    finally:
        torch.backends.cudnn.benchmark = before
    return found

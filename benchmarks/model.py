"""The network alone, ours and others': a forward pass, and forward with backward.

    python -m benchmarks.model --peer score_sde_pytorch=/path --peer edm=/path --model ncsnpp

The forward pass is in evaluation mode without gradients, as samplers make it; forward with
backward is in training mode, with gradients of all weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import contenders, harness


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both passes of all contenders in turn, with the memory that each takes."""
    known = contenders.line_up(args)
    x = contenders.images(contenders.configure(args, "fp32"))
    labels = contenders.labels_for(x)
    report = contenders.facts(known, x, args)
    works = {
        "forward": {n: lambda c=c: c.forward(x, labels) for n, c in known.items()},
        "forward and backward": {
            n: lambda c=c: c.forward_backward(x, labels) for n, c in known.items()
        },
    }
    report["measurements"] = {}
    for (title, each), factor in zip(works.items(), (1, 3), strict=True):
        flops = contenders.work_flops(known, report["flops_forward"], factor * len(x))
        report["measurements"][title] = harness.measurement(
            each,
            len(x),
            args,
            held={name: c.weights_held for name, c in known.items()},
            work_flops=flops,
            precisions={name: c.precision for name, c in known.items()},
        )
    return report


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("model", __doc__)
    contenders.add_options(parser)
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON, and return the report."""
    return harness.run("model", parse(given), measure)


if __name__ == "__main__":
    main()

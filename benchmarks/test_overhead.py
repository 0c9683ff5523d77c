"""Host time of one operator call: tensors so small that only the call itself is left.

On a GPU the work is launched and not waited for.  The clock is the process's CPU time: on a shared machine, a window of
milliseconds is interrupted and one of microseconds is not, which would favour the shorter one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Expected, Race, Run, device
from benchmarks.providers import TOLERANCE, entries, passes
from benchmarks.shapes import NORM
from fastalex import functional as FF

CALLS = 50
SHAPES = {"conv2d_relu": (1, 8, 3, 3), "linear_relu_dropout": (1, 8)}
OURS: dict[str, Callable[..., Tensor]] = {
    "local_response_norm": lambda x: FF.local_response_norm(x, *NORM),
    "max_pool2d": lambda x: FF.max_pool2d(x, 3, 2),  # type: ignore[dict-item, return-value]
    "lrn_max_pool2d": lambda x: FF.lrn_max_pool2d(x, *NORM, after_relu=True),
    "conv2d_relu": FF.conv2d_relu,
    "linear_relu_dropout": lambda x, weight, bias: FF.linear_relu_dropout(x, weight, bias, training=False),
}
EAGER: dict[str, Callable[..., Tensor]] = {
    "local_response_norm": lambda x: F.local_response_norm(x, *NORM),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2),
    "lrn_max_pool2d": lambda x: F.max_pool2d(F.local_response_norm(x, *NORM), 3, 2),
    "conv2d_relu": lambda x, weight, bias: F.relu(F.conv2d(x, weight, bias)),
    "linear_relu_dropout": lambda x, weight, bias: F.relu(F.linear(x, weight, bias)),
}
CASES = [
    Case("overhead", which, "fp32", SHAPES.get(operation, (1, 8, 5, 5)), operation)
    for operation in OURS
    for which in ("forward", "both")
]


def prepare(case: Case, names: list[str]) -> Race:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(case.shape, generator=generator) + 0.1]
    if case.layer == "conv2d_relu":
        inputs += [torch.rand(8, 8, 1, 1, generator=generator), torch.ones(8)]
    elif case.layer == "linear_relu_dropout":
        inputs += [torch.rand(8, 8, generator=generator), torch.ones(8)]
    inputs = [t.to(device()) for t in inputs]
    inputs = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
    grad = torch.ones_like(EAGER[case.layer](*inputs))

    def once(functions: dict[str, Callable[..., Tensor]]) -> Run:
        return passes(functions[case.layer], inputs, grad, case.passes)

    def build(name: str) -> Run:
        call = once(OURS if name == "fastalex" else EAGER)

        def run() -> Any:
            for _ in range(CALLS):
                out = call()
            return out

        return run

    def expected() -> Expected:
        out = once(EAGER)()
        return Expected(out if isinstance(out, tuple) else (out,), TOLERANCE["fp32"])

    builders = {name: functools.partial(build, name) for name in names}
    return Race(builders, expected, calls=CALLS, host=True, clock=time.process_time)


@entries(CASES, CASES, ("fastalex", "eager"))
def test_overhead(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)

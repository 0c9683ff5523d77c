"""A step of SGD with bf16 gradients, and the bf16 weights of the next forward pass.

fastalex updates split weights.  eager does what autocast does around torch's fused SGD: gradients are cast to fp32,
fp32 weights updated and cast to bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Expected, Race, Run, check, checked_while_building, device
from benchmarks.providers import entries
from fastalex import optim
from fastalex.alexnet import parameter_shapes
from fastalex.variants import PAPER

OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
SHAPES = parameter_shapes(PAPER, 1000)
# On a CPU the convolutions' parameters: 3.7 of 62.4 million.
LAYERS = {"paper": list(SHAPES.values()), "convolutions": [s for name, s in SHAPES.items() if "features" in name]}
CUDA, CPU = (
    [Case("sgd", "step", "bf16", (sum(s.numel() for s in LAYERS[layer]),), layer)]
    for layer in ("paper", "convolutions")
)


def prepare(case: Case, names: list[str]) -> Race:
    """The weights after one step are checked before steps are timed."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in LAYERS[case.layer]]
    grads = [torch.randn(shape, generator=generator).bfloat16().to(device()) for shape in LAYERS[case.layer]]

    @functools.cache
    def expected() -> Expected:
        wide = [w.to(device()).double() for w in weights]
        after = [
            w - OPTIONS["lr"] * (g.double() + OPTIONS["weight_decay"] * w) for w, g in zip(wide, grads, strict=True)
        ]
        return Expected(after, 1e-6)

    def build(name: str) -> Run:
        parameters = [nn.Parameter(weight.to(device())) for weight in weights]
        kind: Any = functools.partial(optim.SGD, split=True) if name == "fastalex" else torch.optim.SGD
        optimizer = kind(parameters, **OPTIONS, fused=True)

        def step() -> None:
            optimizer.step()

        def step_with_casts() -> Sequence[Tensor]:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.float()
            optimizer.step()
            return [parameter.detach().bfloat16() for parameter in parameters]

        if name == "fastalex":
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            step()
            with optimizer.joined():
                check([parameter.detach() for parameter in parameters], expected())
            return step
        step_with_casts()
        check([parameter.detach() for parameter in parameters], expected())
        return step_with_casts

    return Race(
        {name: functools.partial(build, name) for name in names},
        checked_while_building(expected),
        observe=lambda nothing: (),
        bytes=18 * case.shape[0],
    )


@entries(CPU, CUDA, ("fastalex", "eager"), cuda_quick=lambda case: ("fastalex", "eager"))
def test_sgd(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare)

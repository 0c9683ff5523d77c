"""How many operations each operator stands for, as torch.utils.flop_counter counts: two per product, nothing else."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from fastalex.reference import convolved_size

OPS = torch.ops.fastalex
Shape = Sequence[int]
COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[Any, Callable[..., int]] = {}


def of(*operators: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Keeps the formula of these operators; it takes shapes where they take tensors."""

    def keep(formula: Callable[..., int]) -> Callable[..., int]:
        FORMULAS.update(dict.fromkeys(operators, formula))
        return formula

    return keep


def convolution(input: Shape, weight: Shape, stride: Shape, padding: Shape, dilation: Shape) -> int:
    sizes = zip(input[2:], weight[2:], stride, padding, dilation, strict=True)
    return 2 * input[0] * math.prod(convolved_size(*size) for size in sizes) * math.prod(weight)


@of(OPS.conv2d_relu, OPS.conv2d_relu_pool)
def _(input: Shape, weight: Shape, bias: Shape | None, *geometry: Any, **_: Any) -> int:
    return convolution(input, weight, *geometry[:3])


@of(OPS.conv2d_relu_backward)
def _(grad: Shape, input: Shape, weight: Shape, output: Shape, *geometry: Any, **_: Any) -> int:
    return sum(geometry[-1][:2]) * convolution(input, weight, *geometry[:3])


@of(OPS.conv2d_relu_pool_backward)
def _(grad: Shape, codes: Shape, activation: Shape, input: Shape, weight: Shape, *geometry: Any, **_: Any) -> int:
    return sum(geometry[-1][:2]) * convolution(input, weight, *geometry[:3])


@of(OPS.linear_relu_dropout)
def _(input: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(input[:-1]) * math.prod(weight)


@of(OPS.linear_relu_dropout_backward)
def _(grad: Shape, input: Shape, weight: Shape, output: Shape, p: float, needs: list[bool], **_: Any) -> int:
    return sum(needs[:2]) * 2 * math.prod(input[:-1]) * math.prod(weight)


@of(
    OPS.local_response_norm,
    OPS.local_response_norm_backward,
    OPS.max_pool2d,
    OPS.max_pool2d_backward,
    OPS.max_pool2d_indices,
    OPS.lrn_max_pool2d,
    OPS.lrn_max_pool2d_backward,
    OPS.augment,
)
def _(*args: Any, **_: Any) -> int:
    """Neither does torch count its own."""
    return 0


class _WithFormulas(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody imports PyTorch's counter, which brings in Triton and takes 0.1 s."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: Any) -> None:
    for operator, formula in FORMULAS.items():
        counter.register_flop_formula(operator)(formula)


if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WithFormulas())

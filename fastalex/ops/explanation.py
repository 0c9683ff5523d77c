"""What a call would launch: its operators, found by running it on fake tensors, and the dispatch's choice for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex import backend
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_INPUT_GRAD, CONV2D_RELU, CONV2D_WEIGHT_GRAD, output_format
from fastalex.gpu.linear import LINEAR_RELU
from fastalex.ops.geometry import Conv


class _Recorder(TorchDispatchMode):
    """Keeps the calls of fastalex's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastalex":
            self.calls.append((function._opname, args))
        return function(*args, **(kwargs or {}))


def operator_calls(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """(name, arguments) of each of fastalex's operators that the call runs, in order.  Nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _Recorder() as recorder:
        fakes = [fake.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        named = {name: fake.from_tensor(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        function(*fakes, **named)
    return recorder.calls


Calls = list[tuple[dispatch.Operation, tuple[Any, ...]]]


def dispatched(name: str, args: tuple[Any, ...], *, training: bool = True) -> Calls:
    """The operations with a choice behind one operator call, with their arguments: forward, then the gradients.

    The input gradient only where the input needs one; the tensors stay fake or real, as they are in `args`.
    """
    if name in ("conv2d_relu", "conv2d_relu_pool"):
        input, weight, bias, flat = args[:4]
        conv = Conv.of(flat)
        found: Calls = [(CONV2D_RELU, (input, weight, bias, *conv))]
        if not training:
            return found
        grad = torch.empty(
            conv.output_shape(input, weight),
            dtype=input.dtype, device=input.device, memory_format=output_format(input, weight),
        )  # fmt: skip
        backward = (grad, input, weight, *conv)
        return [*found, (CONV2D_WEIGHT_GRAD, backward), (CONV2D_INPUT_GRAD, backward)]
    if name == "linear_relu_dropout" and args[3] == 0:
        return [(LINEAR_RELU, (args[0].reshape(-1, args[0].shape[-1]), *args[1:3]))]
    return []


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """See `fastalex.backend.explain`."""
    lines = []
    for name, call in operator_calls(function, *args, **kwargs):
        tensor = next(a for a in call if isinstance(a, Tensor))
        if tensor.device.type == "cpu" and backend.current() != "triton":
            lines.append(f"{name}: fastalex.cpu, for CPU tensors")
            continue
        reason = backend.refusal(tensor)
        if reason is not None:
            lines.append(f"{name}: cannot run: {reason}")
            continue
        choices = dispatched(name, call)
        if not choices:
            lines.append(f"{name}: Triton kernel")
        for operation, arguments in choices:
            try:
                candidate, why = dispatch.choose(operation, *arguments)
                lines.append(f"{name}: {operation.name} by {candidate.name} ({why})")
            except RuntimeError as error:
                lines.append(f"{name}: {error}")
    if not lines:
        lines.append(f"no operator of fastalex runs (backend {backend.current()})")
    return "\n".join(lines)

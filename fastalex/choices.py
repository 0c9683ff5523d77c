"""What a call would launch: its operators, found by running it on fake tensors, and the dispatch's choice for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalex import backend, dynamo
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_INPUT_GRAD, CONV2D_RELU, CONV2D_WEIGHT_GRAD, output_format
from fastalex.gpu.linear import LINEAR_RELU
from fastalex.ops.geometry import Conv
from fastalex.private import FakeTensorMode, TorchDispatchMode, detect_fake_mode


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
    """(name, arguments) of each of fastalex's operators that the call runs, in order.  Nothing is computed.

    But for a compiled module, which Dynamo must call once: it is taken for one of the backend "fastalex".
    """
    if dynamo.is_compiled(function):
        graphs, _ = dynamo.rewritten(function, *args, **kwargs)
        with _Recorder() as recorder:
            for graph in graphs:
                inputs = dynamo.inputs_of(graph)
                with detect_fake_mode(inputs) or contextlib.nullcontext():
                    graph(*inputs)
        return recorder.calls
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
    """What `function(*args, **kwargs)` would run: one line per operator and choice, with the reason.

    function: one of `fastalex.functional`, a module or a whole model.  The call is traced on fake tensors: nothing is
    computed or launched, and no memory is allocated; only a compiled module is called once, as by `fastalex.explain`,
    which says what became part of the operators.  The choices of the backward pass are listed as if every tensor
    needed a gradient.

        >>> print(fastalex.choices.explain(model, images))
        conv2d_relu_pool: conv2d_relu by library (shipped default; not measured here: conv2d_relu: 96x27x27 -> ...)
        ...
    """
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
        operations = dispatched(name, call)
        if not operations:
            lines.append(f"{name}: Triton kernel")
        for operation, arguments in operations:
            try:
                candidate, why = dispatch.choose(operation, *arguments)
                lines.append(f"{name}: {operation.name} by {candidate.name} ({why})")
            except RuntimeError as error:
                lines.append(f"{name}: {error}")
    if not lines:
        lines.append(f"no operator of fastalex runs (backend {backend.current()})")
    return "\n".join(lines)

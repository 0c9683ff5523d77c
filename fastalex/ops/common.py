"""What every operator needs: its registration, its memory format, its kernels, and a refusal of double backward.

An operator is registered with torch.library, which is what torch.compile, torch.export, fake tensors, vmap and tensor
subclasses see.  That border costs 7 to 12 us of host time per call forward, 46 to 70 us with its backward.  `call`
leaves it out where nobody watches: it runs the same function, in an ordinary autograd.Function if a gradient is
needed.  Transforms of torch.func get an autograd.Function too, around the registered operator.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastalex import private
from fastalex.kernels.geometry import dense, memory_format


def empty(like: Tensor, shape: tuple[int, ...] | list[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in the memory format of `like`."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like))


def device_of(input: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext()


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """torch.library.custom_op for CPU and CUDA tensors, with the plain function kept for `call`.

    The function gets every tensor as `dense` makes it: no kernel behind an operator meets other memory.
    """

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def packed(*args: Any) -> Any:
            return function(*map(_dense, args))

        op: Any = torch.library.custom_op(name, packed, mutates_args=(), device_types=("cpu", "cuda"))
        op.plain = packed
        op.recorded = op.transformed = op
        op.register_vmap(functools.partial(_one_by_one, op))
        return op

    return register


def _dense(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_dense(item) for item in arg]
    return dense(arg) if isinstance(arg, Tensor) else arg


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """vmap of any operator: a call for each example, stacked."""

    def example(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, list) and isinstance(dim, list):
            return [example(item, d, i) for item, d in zip(arg, dim, strict=True)]
        return arg.select(dim, i) if isinstance(arg, Tensor) and isinstance(dim, int) else arg

    results = [
        op(*(example(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)
    ]
    stacked = private.tree_map(lambda *parts: torch.stack(parts), *results)
    return stacked, private.tree_map(lambda _: 0, stacked)


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives the operator its backward: registered, and as the two autograd.Functions that `call` takes.

    For an argument that is a list of tensors, none of which gets a gradient, `backward` returns a list of None; an
    autograd.Function wants one None.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def without_lists(ctx: Any, *grads: Any) -> Any:
        return tuple(None if isinstance(grad, list) else grad for grad in backward(ctx, *grads))

    def forward(ctx: Any, *args: Any) -> Any:
        output = op.plain(*args)
        # without this, every backward pass fills zeros for the outputs that have no gradient (codes, activation)
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, output)
        return output

    def backward_or_nothing(ctx: Any, grad: Tensor | None, *rest: None) -> Any:
        return (None,) * len(ctx.needs_input_grad) if grad is None else without_lists(ctx, grad, *rest)

    op.recorded = _function(op, forward=staticmethod(forward), backward=staticmethod(backward_or_nothing))
    op.transformed = _transformed(op, setup_context, without_lists)


def _transformed(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for torch.func.grad and its kin, which refuse the Function that register_autograd makes."""
    return _function(
        op,
        forward=staticmethod(lambda *args: op(*args)),
        setup_context=staticmethod(setup_context),
        backward=staticmethod(backward),
        generate_vmap_rule=True,
    )


def _function(op: Any, **members: Any) -> Callable[..., Any]:
    return type(op.plain.__name__, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def call(op: Any, *args: Any) -> Any:
    """The operator's result: through torch.library where somebody watches, else by the shortest way to the same.

    A backward operator has no Function: where its own gradient might be asked for it is called as registered, and so
    refuses a double backward.  Raises RuntimeError under forward-mode differentiation, which a registered operator
    would silently answer with zero tangents.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if private.forward_mode_is_active():
        raise RuntimeError(
            f"fastalex.{op.plain.__name__} has no forward-mode derivative; for jvp run it under "
            'fastalex.backend.use("reference")'
        )
    if private.functorch_is_active():
        return op.transformed(*args)
    if is_watched(args):
        return op(*args)
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return op.recorded(*args)
    return op.plain(*args)


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a mode, a tracer or a tensor subclass must see the operator as one call."""
    if private.a_mode_is_active() or torch.jit.is_tracing():
        return True
    for arg in args:
        if isinstance(arg, Tensor) and (
            (type(arg) is not Tensor and type(arg) is not Parameter) or not (arg.is_cpu or arg.is_cuda)
        ):
            return True
    return False


def refuse_double_backward(backward_op: Any, operation: str) -> None:
    """Registers a backward for a backward operator that raises a message instead of leaving zero gradients."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"fastalex.{operation} has no second derivative; for double backward run it under "
            'fastalex.backend.use("reference")'
        )

    backward_op.register_autograd(backward)
    backward_op.transformed = _transformed(backward_op, lambda ctx, inputs, output: None, backward)

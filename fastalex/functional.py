"""The operations as functions, with the signatures of `torch.nn.functional`.

Arguments may come in every form that torch takes: an int, `[int]`, two ints, NumPy's integers, `padding="same"`, a
picture without a batch where torch allows it.

Every function takes float32, float16 and bfloat16 (float64 on the CPU, and anywhere through the reference path), in
NCHW or channels_last memory, and returns the input's dtype and memory format.  Tensors may be sliced, transposed,
expanded and empty, weights, biases and gradients too.  NaN and infinities arrive where torch's do.  Gradients are
deterministic: no atomics, two runs are bit-equal.  Bad arguments raise ValueError, tensors of different dtypes or
devices RuntimeError, before anything is launched.  `fastalex.backend` chooses the implementation.

Under autocast the convolution and the linear layer run in the autocast dtype, as torch's do; LRN and pooling keep
the dtype of their input (eager PyTorch would promote LRN to float32).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence, Sized
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, fx, nn

from fastalex import backend, ops, reference
from fastalex.kernels.geometry import MAX_CELLS, dense, output_size
from fastalex.ops.common import call
from fastalex.ops.geometry import Conv
from fastalex.reference import IntOrPair, pair

__all__ = [
    "ResponseNorm",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "feature_distance",
    "linear_relu_dropout",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
]


class ResponseNorm(NamedTuple):
    """The parameters of `local_response_norm` as one value."""

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    groups: int = 1


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """relu(conv2d(...)): (N, C, H, W) or (C, H, W), (K, C/groups, R, S) -> (N, K, OH, OW) or (K, OH, OW).

    Keeps input, weight and output for backward, no mask.  Channels_last if the input or the weight is.
    Raises ValueError for shapes or parameters that do not fit, RuntimeError for mixed dtypes or devices.
    """
    if input.dim() == 3:
        return conv2d_relu(input[None], weight, bias, stride, padding, dilation, groups)[0]
    input, weight, bias = _autocast(input, weight, bias)
    input, geometry, groups = _conv2d_geometry(input, weight, stride, padding, dilation, groups)
    _check_conv2d(input, weight, bias, *geometry, groups)
    if backend.takes_reference("conv2d_relu", input):
        return reference.conv2d_relu(input, weight, bias, *geometry, groups)
    return call(ops.conv2d_relu, input, weight, bias, Conv(*geometry, groups).flat)


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """x / (k + alpha/size * sum of x^2 over `size` neighbouring channels) ** beta: (N, C, ...) -> the same shape.

    Exactly torch.nn.functional.local_response_norm, with sums in float32 whatever the dtype, and `groups` to
    normalise inside each of that many channel groups.  Keeps only the input for backward.
    Raises ValueError if size < 1, the input has fewer than 3 dimensions, or groups does not divide its channels.
    """
    size, groups = operator.index(size), operator.index(groups)
    _check_floating(input)
    _check_lrn(input.shape, size, groups)
    if backend.takes_reference("local_response_norm", input):
        return reference.local_response_norm(input, size, alpha, beta, k, groups=groups)
    return call(ops.local_response_norm, input, [size, alpha, beta, k, groups])


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
) -> Tensor: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None,
    padding: IntOrPair,
    dilation: IntOrPair,
    ceil_mode: bool,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exactly torch.nn.functional.max_pool2d: (N, C, H, W) or (C, H, W) -> pooled, NaN and tie rules included.

    Keeps one byte per window for backward instead of torch's int64 index; indices are made only when asked for.
    Windows of more than 127 cells, and integers, are torch's own to pool.
    Raises ValueError for parameters that torch refuses.
    """
    if input.dim() == 3:
        out = max_pool2d(input[None], kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return (out[0][0], out[1][0]) if isinstance(out, tuple) else out[0]
    window, step = _window(kernel_size, stride)
    pad, spread = pair(padding, "padding"), pair(dilation, "dilation")
    _check_pool(input.shape, window, step, pad, spread, ceil_mode)
    if backend.takes_reference("max_pool2d", input):
        return reference.max_pool2d(input, window, step, pad, spread, ceil_mode, return_indices)
    if not input.is_floating_point() or window[0] * window[1] > MAX_CELLS:
        pool: Any = nn.functional.max_pool2d_with_indices if return_indices else nn.functional.max_pool2d
        return pool(input, window, step, pad, spread, ceil_mode)
    codes_wanted = return_indices or _needs_grad(input)
    flat = [*window, *step, *pad, *spread]
    output, codes = call(ops.max_pool2d, input, flat, ceil_mode, codes_wanted)
    if not return_indices:
        return output
    return output, call(ops.max_pool2d_indices, codes, list(input.shape[2:]), flat)


def lrn_max_pool2d(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    kernel_size: IntOrPair = 3,
    stride: IntOrPair | None = 2,
    *,
    groups: int = 1,
    after_relu: bool = False,
) -> Tensor:
    """max_pool2d(local_response_norm(input)), fused each way: (N, C, H, W) -> (N, C, OH, OW).

    `after_relu` promises that the input is the output of a ReLU.  Then the forward pass compares packed non-negative
    values, and the gradient is that before the ReLU: zero wherever the maximum of a window is zero.
    Raises ValueError as `local_response_norm` and `max_pool2d` do.
    """
    window, step = _window(kernel_size, stride)
    size, groups = operator.index(size), operator.index(groups)
    _check_floating(input)
    _check_lrn(input.shape, size, groups)
    _check_pool(input.shape, window, step, (0, 0), (1, 1), False)
    if backend.takes_reference("lrn_max_pool2d", input):
        return reference.lrn_max_pool2d(input, size, alpha, beta, k, window, step, groups=groups)
    if window[0] * window[1] > MAX_CELLS:
        normalised = local_response_norm(input, size, alpha, beta, k, groups=groups)
        return max_pool2d(normalised, window, step)
    codes_wanted = _needs_grad(input)
    return call(ops.lrn_max_pool2d, input, [size, alpha, beta, k, groups], [*window, *step], after_relu, codes_wanted)[
        0
    ]


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    norm: ResponseNorm | None = None,
    kernel_size: IntOrPair = 3,
    pool_stride: IntOrPair | None = 2,
) -> Tensor:
    """A stage of AlexNet, max_pool2d([local_response_norm](relu(conv2d(input)))), as one node of the autograd graph.

    (N, C, H, W) or (C, H, W) -> (N, K, OH, OW) or (K, OH, OW).  The ReLU mask and the bias gradient come out of the
    pooling backward instead of a pass of their own.
    Raises as `conv2d_relu`, `local_response_norm` and `max_pool2d` do.
    """
    if input.dim() == 3:
        batch = conv2d_relu_max_pool2d(
            input[None], weight, bias, stride, padding, dilation, groups,
            norm=norm, kernel_size=kernel_size, pool_stride=pool_stride,
        )  # fmt: skip
        return batch[0]
    input, weight, bias = _autocast(input, weight, bias)
    input, geometry, groups = _conv2d_geometry(input, weight, stride, padding, dilation, groups)
    _check_conv2d(input, weight, bias, *geometry, groups)
    window, step = _window(kernel_size, pool_stride)
    conv = Conv(*geometry, groups)
    activation = conv.output_shape(input, weight)
    _check_pool(activation, window, step, (0, 0), (1, 1), False)
    if norm is not None:
        norm = norm._replace(size=operator.index(norm.size), groups=operator.index(norm.groups))
        _check_lrn(activation, norm.size, norm.groups)
    if backend.takes_reference("conv2d_relu_max_pool2d", input) or window[0] * window[1] > MAX_CELLS:
        output = conv2d_relu(input, weight, bias, *geometry, groups)
        if norm is not None:
            output = local_response_norm(output, *norm[:4], groups=norm.groups)
        return max_pool2d(output, window, step)
    flat = [*conv.flat, *window, *step]
    return call(ops.conv2d_relu_pool, input, weight, bias, flat, list(norm or ()), _needs_grad(input, weight, bias))[0]


def linear_relu_dropout(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, p: float = 0.5, training: bool = True
) -> Tensor:
    """dropout(relu(linear(input, weight, bias)), p, training): (..., C), (K, C) -> (..., K).

    Backward reads ReLU mask and dropout mask off the saved output.  What is dropped follows torch's random state;
    the stream differs from `torch.nn.functional.dropout`'s.
    Raises ValueError unless 0 <= p <= 1 and the shapes fit, RuntimeError for mixed dtypes or devices.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p, the dropout probability, must lie in [0, 1], got {p}")
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must be (..., in_features) and weight (out_features, in_features), "
            f"got {_shape(input)} and {_shape(weight)}"
        )
    if not training:
        p = 0.0
    # nothing is left to fuse where all is dropped
    by_reference = p == 1 or backend.takes_reference("linear_relu_dropout", input)
    if not by_reference and _operator_narrows(input, weight, bias):
        _check_same("linear_relu_dropout", weight, weight, bias)
        input = input.to(torch.get_autocast_dtype("cpu"))
    else:
        input, weight, bias = _autocast(input, weight, bias)
        _check_same("linear_relu_dropout", input, weight, bias)
    if by_reference:
        return reference.linear_relu_dropout(input, weight, bias, p, training)
    seed = torch.randint(2**62, (1,), device=input.device) if p > 0 else None
    return call(ops.linear_relu_dropout, input, weight, bias, p, seed)


def feature_distance(a: Tensor, b: Tensor, weight: Tensor | None = None, *, spatial: bool = False) -> Tensor:
    """The distance of LPIPS between two feature maps: (N, C, H, W) each -> (N,), or with `spatial` (N, H, W).

    sum_c w_c (a_c / (|a| + eps) - b_c / (|b| + eps))^2 with norms over the channels and eps = 1e-10, as a mean over
    the pixels or as a map.  weight: (C,), or None for ones.  One of the maps may have a batch of 1, which is compared
    with all of the other's.  Sums in float32.  Pixels whose channels are all zero get no gradient, where autograd makes
    NaN of it.  Keeps the two maps for backward.
    Raises ValueError for shapes that do not fit, RuntimeError for mixed dtypes or devices.
    """
    if a.dim() != 4 or b.dim() != 4 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a and b must be (N, C, H, W) of one size, got {_shape(a)} and {_shape(b)}")
    if 0 in a.shape[1:]:
        raise ValueError(f"a may be empty in its batch only, got shape {_shape(a)}")
    if a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0]):
        raise ValueError(f"a and b must have one batch, or one of them a batch of 1, got {_shape(a)} and {_shape(b)}")
    if weight is not None and _shape(weight) != (a.shape[1],):
        raise ValueError(f"weight must have shape ({a.shape[1]},), as the channels of a, got {_shape(weight)}")
    _check_floating(a)
    for name, other in (("b", b), ("weight", weight)):
        if other is not None and other.dtype != a.dtype:
            raise RuntimeError(f"feature_distance: {name} is {other.dtype} but a is {a.dtype}")
        if other is not None and other.device != a.device:
            raise RuntimeError(f"feature_distance: {name} is on {other.device} but a is on {a.device}")
    if backend.takes_reference("feature_distance", a):
        return reference.feature_distance(a, b, weight, spatial=spatial)
    if a.shape[0] == 1 != b.shape[0]:
        a, b = b, a
    return call(ops.feature_distance, a, b, weight, spatial).to(a.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.jit.is_tracing():  # the trace may be differentiated later
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of convolutions where autocast is on for the tensor's device, None where it is not."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in the autocast dtype, where autocast is on for their device."""
    dtype = autocast_dtype(input)
    if dtype is None or input.dtype == torch.float64:
        return input, weight, bias
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _operator_narrows(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autocast is left to the CPU operator, which narrows float32 parameters for less than `_autocast` does."""
    return (
        torch.is_autocast_enabled("cpu")
        and all(t is None or t.is_cpu for t in (input, weight, bias))
        and all(t is None or t.dtype == torch.float32 for t in (weight, bias))
        and input.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not backend.takes_triton("linear_relu_dropout", input)
    )


def _window(kernel_size: IntOrPair, stride: IntOrPair | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """A pooling window and its stride; without a stride, windows do not overlap."""
    window = pair(kernel_size, "kernel_size")
    absent = stride is None or (isinstance(stride, Sized) and len(stride) == 0)
    return window, window if absent else pair(stride, "stride")  # type: ignore[arg-type]


def _conv2d_geometry(
    input: Tensor,
    weight: Tensor,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
) -> tuple[Tensor, tuple[tuple[int, int], tuple[int, int], tuple[int, int]], int]:
    """The input, (stride, padding, dilation) in numbers, and groups.

    The input is padded here where "same" needs a row or a column more on one side, and where PyTorch 2.14's oneDNN goes
    wrong: it dies of a SIGSEGV, strided and dilated, with windows that lie wholly in the padding, on one or two
    columns; and its weight gradient reads what lies behind a padded input narrower than a step, in bfloat16 and
    channels_last.  The dilation of a single cell is 1, for the first reason.
    """
    steps, spread, groups = pair(stride, "stride"), pair(dilation, "dilation"), operator.index(groups)
    text = padding if isinstance(padding, str) else None
    if text not in (None, "same", "valid"):
        raise ValueError(f'padding must be "valid", "same" or numbers, got {padding!r}')
    if text == "same" and steps != (1, 1):
        raise ValueError(f'padding="same" needs stride 1, got {steps}')
    border = (0, 0) if text is not None else pair(padding, "padding")  # type: ignore[arg-type]
    window = weight.shape[2:]
    if len(window) != 2 or input.dim() != 4 or min(*steps, *spread) < 1 or min(border) < 0:
        return input, (steps, border, spread), groups  # to be refused
    spread = tuple(1 if size == 1 else d for size, d in zip(window, spread, strict=True))  # type: ignore[assignment]
    reach = [d * (size - 1) for size, d in zip(window, spread, strict=True)]
    before, after = [0, 0], [0, 0]
    if text == "same":
        border, after = (reach[0] // 2, reach[1] // 2), [reach[0] % 2, reach[1] % 2]
    else:
        for i in (0, 1):
            if (steps[i] > 1 and spread[i] > 1 and border[i] > reach[i]) or input.shape[2 + i] < steps[i]:
                before[i] = after[i] = border[i]
        border = border[0] - before[0], border[1] - before[1]
    if any(before) or any(after):
        # packed first: where NaN meets padding, the layout that the library sees decides what comes out
        input = nn.functional.pad(dense(input), (before[1], after[1], before[0], after[0]))
    return input, (steps, border, spread), groups


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_floating(input: Tensor) -> None:
    if not input.is_floating_point():
        raise RuntimeError(f"input must be a floating-point tensor, got {input.dtype}")


def _check_same(operation: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_floating(input)
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.dtype != input.dtype:
            raise RuntimeError(f"{operation}: {name} is {other.dtype} but input is {input.dtype}")
        if other.device != input.device:
            raise RuntimeError(f"{operation}: {name} is on {other.device} but input is on {input.device}")
    if bias is not None and _shape(bias) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight's first dimension, got {_shape(bias)}")


def _check_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    shape, window = input.shape, weight.shape
    if len(shape) != 4:
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {_shape(input)}")
    if len(window) != 4:
        raise ValueError(f"weight must be (K, C / groups, R, S), got shape {_shape(weight)}")
    if groups < 1 or window[0] % groups:
        raise ValueError(f"groups must be positive and divide the {window[0]} output channels, got {groups}")
    if shape[1] != window[1] * groups:
        raise ValueError(
            f"input has {shape[1]} channels, weight of shape {_shape(weight)} with groups={groups} "
            f"takes {window[1] * groups}"
        )
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if value[0] < least or value[1] < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for axis, name in ((0, "height"), (1, "width")):
        padded = shape[2 + axis] + 2 * padding[axis]
        if padded < dilation[axis] * (window[2 + axis] - 1) + 1:
            raise ValueError(
                f"the weight of shape {_shape(weight)} is larger than the padded input {name} {padded} "
                f"(input {_shape(input)}, padding {padding}, dilation {dilation})"
            )
    _check_same("conv2d_relu", input, weight, bias)


def _check_lrn(shape: Sequence[int], size: int, groups: int) -> None:
    if len(shape) < 3:
        raise ValueError(f"input must have at least 3 dimensions (N, C, ...), got shape {tuple(shape)}")
    if size < 1:
        raise ValueError(f"size, the number of channels in a window, must be at least 1, got {size}")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"groups must be positive and divide the {shape[1]} channels, got {groups}")


def _check_pool(
    shape: Sequence[int],
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> None:
    if len(shape) != 4:
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(shape)}")
    for name, value, least in (
        ("kernel_size", window, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if value[0] < least or value[1] < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if min(shape[1:]) == 0:
        raise ValueError(f"input may be empty in its batch only, got shape {tuple(shape)}")
    out = output_size(shape[2:], window, stride, padding, dilation, ceil_mode)
    for axis, name in ((0, "height"), (1, "width")):
        if 2 * padding[axis] > window[axis]:
            raise ValueError(f"padding must be at most half of kernel_size, got {padding} for {window}")
        if out[axis] < 1:
            raise ValueError(
                f"the window kernel_size {window} with padding {padding} and dilation {dilation} does not fit into "
                f"the input's {name} {shape[2 + axis]}"
            )


# torch.fx sees each of them as one call, whatever is decided by shapes inside
for _name in __all__[1:]:
    fx.wrap(_name)

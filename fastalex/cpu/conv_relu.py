"""Convolution, bias and ReLU through oneDNN's fused form where this PyTorch has it, else conv2d and relu_.

The operator is private to PyTorch, so it is looked for and never required.  A weight whose values have been seen
before is kept in oneDNN's blocked layout: inference then reorders it once instead of in every call (bf16 at batch 1 on
a Sapphire Rapids: 0.6 to 0.9 of the time), while a weight that an optimiser changes at every step is never kept.
Where `fastalex.cpu.winograd` is faster, its matrices are kept instead.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex.cpu import winograd

Sizes = list[int] | tuple[int, ...]


def has_fused_convolution() -> bool:
    """Whether this build of PyTorch has oneDNN's fused convolution and its weight layout."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    )


def has_onednn_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return name is not None and hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()


@torch.no_grad()
def conv_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> Tensor:
    """max(0, conv2d(x, weight) + bias): (N, C, H, W), (K, C/groups, R, S) -> (N, K, OH, OW)."""
    if not (x.numel() and has_fused_convolution() and has_onednn_dtype(x.dtype)):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()
    sizes = tuple(stride), tuple(padding), tuple(dilation), groups
    use_winograd = winograd.suits(x, weight, *sizes)
    ready = prepared(weight, Geometry(tuple(x.shape[1:]), *sizes, use_winograd), x.shape[0])
    if use_winograd and ready is not None:
        return winograd.conv_relu_fwd(x, ready, bias, groups)
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight if ready is None else ready, bias, padding, stride, dilation, groups, "relu", [], ""
    )


class Geometry(NamedTuple):
    """What the form of a weight depends on: oneDNN's layout, or Winograd's matrices.

    Not the batch: batches of 1 to 128 got one layout for all of AlexNet's convolutions.  Where that should fail, oneDNN
    reorders the weight in the call.
    """

    image_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    winograd: bool


class _Entry(NamedTuple):
    state: tuple[int, int]  # version and address of the weight's values
    geometry: Geometry
    sample: Tensor  # some of the values
    prepared: Tensor | None  # None after the first sight


# By id; an entry goes when its weight does.
_entries: dict[int, _Entry] = {}


def prepared(weight: Tensor, geometry: Geometry, batch: int) -> Tensor | None:
    """The weight in the form of this geometry from the second call with the same values on, before None."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if weight.is_inference() or not dense:
        return None  # an inference tensor has no version counter
    key, state = id(weight), (weight._version, weight.data_ptr())
    # A change through `weight.data` leaves the version as it was.  An update of a whole tensor shows in these values.
    sample = weight.as_strided((min(64, weight.numel()),), (max(1, weight.numel() // 64),))
    entry = _entries.get(key)
    if entry is None:
        weakref.finalize(weight, _entries.pop, key, None)
    if entry is None or entry.state != state or entry.geometry != geometry or not torch.equal(entry.sample, sample):
        _entries[key] = _Entry(state, geometry, sample.clone(), None)
        return None
    if entry.prepared is None:
        entry = entry._replace(prepared=_prepare(weight, geometry, batch))
        _entries[key] = entry
    return entry.prepared


def _prepare(weight: Tensor, geometry: Geometry, batch: int) -> Tensor:
    image_shape, stride, padding, dilation, groups, use_winograd = geometry
    if use_winograd:
        return winograd.transformed(weight, groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub has other arguments
    return reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, (batch, *image_shape))

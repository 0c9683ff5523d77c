"""The two memory layouts, channels last and contiguous: which one a tensor has, and how to bring it there.

Shared by the kernels, the CPU code and the operators; needs no Triton.
"""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that the strides say, packed or not: channels last where the channels lie next to each other.

    An operator's output has its input's; kernels and fake tensors must agree on it, also where sizes of 1 leave both.
    """
    if x.dim() in _CHANNELS_LAST and x.stride(1) == 1 and not x.is_contiguous():
        return _CHANNELS_LAST[x.dim()]
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether memory is packed with the channels (dimension 1) innermost.  One channel counts as contiguous."""
    return x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x if it is packed, channels last or contiguous; otherwise a packed copy in the nearer layout.

    Nearer: channels last if no dimension of more than one element has a smaller stride than the channels.
    """
    if x.is_contiguous() or is_channels_last(x):
        return x
    # an expanded dimension (stride 0) says nothing about the layout
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride > 0]
    if x.shape[1] > 1 and x.stride(1) == min(strides, default=0):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def in_layout_of(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout of the dense tensor x: t itself, or a copy."""
    if is_channels_last(x):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()

"""The two memory layouts, channels last and contiguous: which one a tensor has, and how to bring it there.

Shared by the kernels, the CPU code and the operators; needs no Triton.
"""

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which `dense(x)` is packed, and an operator's output with it.

    Kernels and fake tensors must agree on it, also where sizes of 1 leave both: those count as contiguous.
    """
    if x.dim() in _CHANNELS_LAST and not x.is_contiguous() and _channels_are_innermost(x):
        return _CHANNELS_LAST[x.dim()]
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether memory is packed with the channels (dimension 1) innermost.  One channel counts as contiguous."""
    return x.dim() > 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """What every kernel, Triton's and the CPU's, may be given: x if it is packed, channels last or contiguous;
    otherwise (sliced, transposed, expanded) a packed copy in the nearer layout.

    The operators bring all their tensors here, weights, biases and gradients too.  Nearer: channels last if no
    dimension of more than one element has a smaller stride than the channels.  Dimensions of one element, whose
    strides mean nothing, have those of packed memory: PyTorch's own convolutions look at them.
    """
    if x.is_contiguous():
        return _with_strides(x)
    if is_channels_last(x):
        if 1 not in x.shape:
            return x
        return _with_strides(x.movedim(1, -1)).movedim(-1, 1)
    if _channels_are_innermost(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def _with_strides(x: Tensor) -> Tensor:
    """A contiguous x, with the strides that a new tensor of its shape has."""
    if 1 not in x.shape:
        return x
    strides, size = [], 1
    for length in reversed(x.shape):
        strides.append(size)
        size *= max(1, length)
    strides.reverse()
    return x if x.stride() == tuple(strides) else x.as_strided(x.shape, strides)


def _channels_are_innermost(x: Tensor) -> bool:
    if x.dim() < 3 or x.shape[1] <= 1:
        return False
    # an expanded dimension (stride 0) says nothing about the layout
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride > 0]
    return x.stride(1) == min(strides, default=0)


def in_layout_of(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout of the dense tensor x: t itself, or a copy."""
    if is_channels_last(x):
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()


def fold_weight(weight: Tensor, block: int) -> Tensor:
    """The weight that does to `space_to_depth(x, block)` with stride 1 what `weight` does to x with stride `block`.

    (K, C, R, S) -> (K, block * block * C, ceil(R / block), ceil(S / block)), channels_last; the rows and columns that
    R and S lack to multiples of block are zeros.  Differentiable.  The image must be padded so that its blocks cover
    the windows: (OH + ceil(R / block) - 1) * block rows.
    """
    rows, columns = weight.shape[2:]
    padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block))  # (K, C, R', i, S', j)
    folded = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (K, R', S', (i, j, C))
    return folded.contiguous().permute(0, 3, 1, 2)


def unfold_weight_grad(grad: Tensor, kernel_size: tuple[int, int], block: int) -> Tensor:
    """The gradient of `weight` from that of `fold_weight(weight, block)`: drops what stands for the added zeros.

    (K, block * block * C, R', S') -> (K, C, R, S), contiguous, with (R, S) = kernel_size.
    """
    blocks = grad.unflatten(1, (block, block, -1))  # (K, i, j, C, R', S')
    whole = blocks.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
    return whole[:, :, : kernel_size[0], : kernel_size[1]].contiguous()

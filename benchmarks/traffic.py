"""What a program moves, counted: bytes and calls of ATen and launches of our kernels, without running the kernels.

A call of ATen, or a launch of ours, reads its tensors and writes its results, each once, with no cache between them;
views move nothing.  Nothing is timed.  Needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from fastalex import backend

# what begins with these moves nothing
VIEWS = (
    *("view", "expand", "t.", "transpose", "permute", "alias", "detach", "unsqueeze", "squeeze", "slice", "select"),
    *("as_strided", "_unsafe_view", "reshape", "empty", "new_empty", "size", "stride", "split", "unbind", "is_"),
    *("_local_scalar", "promote_types"),
)
# of a convolution: also the blocks of pixels that conv1 makes for itself
CONVOLUTION = ("convolution", "space_to_depth", "constant_pad_nd")
# read and written in place
IN_PLACE = ("bias_relu_kernel",)


def nbytes(tensor: Tensor) -> int:
    """Of its elements, or of its memory where elements share it."""
    if tensor.numel() == 0:
        return 0
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), reach) * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Calls in their order, and the bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            read = {id(value): value for value in tree_leaves((args, kwargs or {}))}
            self.add(name, [*read.values(), *tree_leaves(out)])
        return out

    def add(self, name: str, values: list[Any], times: int = 1) -> None:
        self.passes.append((name, times * sum(nbytes(value) for value in values if isinstance(value, Tensor))))

    def by_name(self) -> dict[str, tuple[int, int]]:
        """Bytes and calls of each kind, the largest first."""
        calls = Counter(name for name, _ in self.passes)
        moved = Counter[str]()
        for name, count in self.passes:
            moved[name] += count
        return {name: (count, calls[name]) for name, count in moved.most_common()}

    def total(self) -> int:
        return sum(count for _, count in self.passes)

    def outside_convolutions(self) -> int:
        return sum(count for name, count in self.passes if not any(part in name for part in CONVOLUTION))


@contextlib.contextmanager
def as_on_a_gpu(traffic: Traffic) -> Iterator[None]:
    """Within the block our operators launch their Triton kernels, which are counted in the place of running."""

    def counted(kernel: Any, grid: Any) -> Any:
        name = kernel.fn.__name__
        return lambda *args, **constants: traffic.add(name, list(args), 2 if name in IN_PLACE else 1)

    launches = mock.patch.object(KernelInterface, "__getitem__", counted)
    unwatched = mock.patch("fastalex.ops.common.is_watched", return_value=False)
    with backend.use("triton"), launches, unwatched:
        yield

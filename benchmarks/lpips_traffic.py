"""What LPIPS moves outside the convolutions, counted: `TRITON_INTERPRET=1 python -m benchmarks.lpips_traffic`.

One pair of 256 x 256 in float32, forward and the gradient of the first image.  A call of ATen, or a launch of ours,
reads its tensors and writes its results, each once, with no cache between them; views move nothing.  Nothing is timed,
and ours are not run: what they would be launched with is recorded.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

from benchmarks.test_lpips import loss_of
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
    """Bytes and calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.add(name, [*tree_leaves((args, kwargs or {})), *tree_leaves(out)])
        return out

    def add(self, name: str, values: list[Any], times: int = 1) -> None:
        self.bytes[name] += times * sum(nbytes(value) for value in values if isinstance(value, Tensor))
        self.calls[name] += 1

    def outside_convolutions(self) -> int:
        return sum(count for name, count in self.bytes.items() if not any(part in name for part in CONVOLUTION))


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


def count(name: str, net: str, size: int = 256) -> tuple[Traffic, int]:
    """The traffic, and the bytes that are kept for the backward pass besides parameters and images."""
    loss = loss_of(name, net)
    image, target = torch.rand(1, 3, size, size, requires_grad=True), torch.rand(1, 3, size, size)
    constant = {t.untyped_storage().data_ptr() for t in [*loss.parameters(), *loss.buffers(), image, target]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with contextlib.ExitStack() as stack:
        traffic = stack.enter_context(Traffic())
        if name == "fastalex":
            stack.enter_context(as_on_a_gpu(traffic))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distance = loss(image, target, normalize=True).mean()
        distance.backward()
    return traffic, sum(size for pointer, size in kept.items() if pointer not in constant)


def row(name: str, net: str, details: bool = False) -> str:
    """A row of the table, with `details` followed by every kind of call."""
    traffic, kept = count(name, net)
    numbers = f"{traffic.bytes.total() / 1e6:,.1f} | {traffic.outside_convolutions() / 1e6:,.1f}"
    lines = [f"| {net} | {name} | {numbers} | {traffic.calls.total()} | {kept / 1e6:.1f} |"]
    if details:
        for key, moved in traffic.bytes.most_common():
            lines.append(f"    {key:40s} {moved / 1e6:9.2f} MB {traffic.calls[key]:4d} calls")
    return "\n".join(lines)


def main() -> None:
    print("| | | all, MB | outside convolutions, MB | launches | kept for backward, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for net in ("alex", "vgg", "squeeze"):
        for name in ("eager-nchw", "fastalex"):
            print(row(name, net, details="-v" in sys.argv))


if __name__ == "__main__":
    main()

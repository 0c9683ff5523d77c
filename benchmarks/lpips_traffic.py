"""What LPIPS moves outside the convolutions, counted: `TRITON_INTERPRET=1 python -m benchmarks.lpips_traffic`.

One pair of 256 x 256 in float32, forward and the gradient of the first image, as `benchmarks.traffic` counts.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from benchmarks.test_lpips import loss_of
from benchmarks.traffic import Traffic, as_on_a_gpu


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
    numbers = f"{traffic.total() / 1e6:,.1f} | {traffic.outside_convolutions() / 1e6:,.1f}"
    lines = [f"| {net} | {name} | {numbers} | {len(traffic.passes)} | {kept / 1e6:.1f} |"]
    if details:
        for key, (moved, calls) in traffic.by_name().items():
            lines.append(f"    {key:40s} {moved / 1e6:9.2f} MB {calls:4d} calls")
    return "\n".join(lines)


def main() -> None:
    print("| | | all, MB | outside convolutions, MB | launches | kept for backward, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for net in ("alex", "vgg", "squeeze"):
        for name in ("eager-nchw", "fastalex"):
            print(row(name, net, details="-v" in sys.argv))


if __name__ == "__main__":
    main()

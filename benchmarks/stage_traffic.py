"""What AlexNet's first stage moves between its convolutions, pass by pass, counted.

    TRITON_INTERPRET=1 python -m benchmarks.stage_traffic [passes.svg]

Bias, ReLU, LRN and max-pool of the variant `paper`, in fp16, forward and backward, as `benchmarks.traffic` counts: what
one picture more in the batch adds, so that parameters do not count.  Prints a table, and draws it as SVG.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastalex
from benchmarks.traffic import Traffic, as_on_a_gpu
from fastalex.files import write_whole

# the library's work, which both have, and where autograd begins
LEFT_OUT = ("convolution", "ones_like")
NAMES = {
    "lrn_max_pool_fwd_kernel": "LRN + max-pool",
    "lrn_max_pool_bwd_kernel": "max-pool + LRN + ReLU + bias, their gradients",
    "sum_partials_kernel": "sum of the bias's gradient",
    "space_to_depth_kernel": "space to depth",
    "bias_relu_kernel": "bias + ReLU",
    "max_pool2d_with_indices_backward": "max-pool",
    "max_pool2d_with_indices": "max-pool",
    "constant_pad_nd": "pad",
    "threshold_backward": "relu",
    "avg_pool3d_backward": "avg_pool3d",
    "add_": "add",
}
BARS = ("PyTorch, forward", "fastalex, forward", "PyTorch, backward", "fastalex, backward")

Passes = list[tuple[str, float]]  # names and megabytes


def stage(name: str) -> nn.Module:
    """The first stage in PyTorch's operations, or ours."""
    model = fastalex.AlexNet(variant="paper").half()
    modules: list[Any] = list(model.features)
    conv, _, pool = modules[:3]
    if name == "fastalex":
        return type(model.features)(conv, nn.Identity(), pool)
    size, alpha, beta, k, _ = pool.norm
    plain = nn.Conv2d(3, 96, conv.kernel_size, conv.stride, conv.padding, dtype=torch.float16)
    return nn.Sequential(
        plain, nn.ReLU(), nn.LocalResponseNorm(size, alpha, beta, k), nn.MaxPool2d(pool.kernel_size, pool.stride)
    )


def calls(name: str, pictures: int) -> list[list[tuple[str, int]]]:
    """Of the forward and of the backward pass of a batch."""
    # PyTorch's pooling takes no half precision on a CPU
    device = "meta" if name == "eager" else "cpu"
    modules = stage(name).to(device)
    images = torch.randn(pictures, 3, 224, 224, dtype=torch.float16, device=device)
    with counting(name) as forward:
        out = modules(images)
    with counting(name) as backward:
        out.backward(torch.ones_like(out))
    return [forward.passes, backward.passes]


@contextlib.contextmanager
def counting(name: str) -> Iterator[Traffic]:
    traffic = Traffic()
    with as_on_a_gpu(traffic) if name == "fastalex" else contextlib.nullcontext(), traffic:
        yield traffic


def passes(name: str) -> list[Passes]:
    """Forward and backward, per picture: a batch of three less a batch of two."""
    found = []
    for two, three in zip(calls(name, 2), calls(name, 3), strict=True):
        assert [key for key, _ in two] == [key for key, _ in three]
        more = [(key.partition(".")[0], (b - a) / 1e6) for (key, a), (_, b) in zip(two, three, strict=True)]
        found.append([(NAMES.get(key, key), size) for key, size in more if size and not key.startswith(LEFT_OUT)])
    return found


def table(bars: dict[str, Passes]) -> str:
    lines = ["| | passes | MB |", "|---|---:|---:|"]
    lines += [f"| {name} | {len(bar)} | {sum(size for _, size in bar):.1f} |" for name, bar in bars.items()]
    return "\n".join(lines)


def drawing(bars: dict[str, Passes]) -> str:
    """SVG: a bar for each of `bars`, a box for each pass, as wide as what it moves; ours are named beside the bar."""
    scale, height, left = 28.0, 76, 8  # points per megabyte, of a bar, and before it
    width = 2 * left + scale * max(sum(size for _, size in bar) for bar in bars.values())
    parts, y = [], 0
    for name, bar in bars.items():
        ours, total, x = name.startswith("fastalex"), sum(size for _, size in bar), float(left)
        head = f"{name}: {len(bar)} passes, {total:.1f} MB"
        parts.append(f'<text x="{left}" y="{y + 18}" font-weight="bold">{head}</text>')
        y += 26
        for i, (label, size) in enumerate(bar):
            box = f'x="{x:.1f}" y="{y}" width="{size * scale - 1:.1f}" height="{height}"'
            parts.append(f'<rect {box} fill="{"#2b6cb0" if ours else "#d9dde3"}"/>')
            if ours:
                place = f'x="{left + total * scale + 10:.1f}" y="{y + 14 + 18 * i}"'
            else:
                place = f'transform="translate({x + size * scale / 2 + 4:.1f} {y + height - 6}) rotate(-90)"'
            parts.append(f"<text {place}>{label}</text>")
            x += size * scale
        y += height + 14
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y}" '
            'font-family="sans-serif" font-size="12" fill="#1a202c">',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def counted() -> dict[str, Passes]:
    """Every bar by its name."""
    theirs, ours = passes("eager"), passes("fastalex")
    return dict(zip(BARS, [theirs[0], ours[0], theirs[1], ours[1]], strict=True))


def main() -> None:
    bars = counted()
    print(table(bars))
    if sys.argv[1:]:
        write_whole(Path(sys.argv[1]), drawing(bars))


if __name__ == "__main__":
    main()

"""The distances of LPIPS and their gradient, as `fastalex.kernels.lpips` has them; `lpips_images` too.

Loops that numba compiles, or without it the formulas.  float64 is computed in float64, everything else in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu.max_pool import code_table, max_pool_bwd
from fastalex.kernels.geometry import Pair, channels_last
from fastalex.reference import feature_distance, sum_dtype


@torch.no_grad()
def lpips_fwd(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]], shapes: Sequence[Sequence[int]], spatial: bool = False
) -> Tensor:
    """(N, layers), or with `spatial` (N, pixels of all layers); float32, float64 for float64."""
    maps = [_map(channels_last(a), channels_last(b), weight) for a, b, weight in pairs]
    return torch.cat(maps, 1) if spatial else torch.stack([m.mean(1) for m in maps], 1)


def _map(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """(N, pixels)"""
    wide = sum_dtype(a.dtype)
    loops = cpu.compiled_loops()
    if loops is None or a.numel() == 0:
        weight = None if weight is None else weight.to(wide)
        return feature_distance(a.to(wide), b.to(wide), weight, spatial=True).flatten(1)
    out = torch.empty(a.shape[0], a.shape[2] * a.shape[3], dtype=wide)
    rows = [loops.array(_looped(t)).reshape(-1, a.shape[1]) for t in (a, b)]
    numbers = _weight(weight, a).numpy(), out.view(-1).numpy(), out.shape[1], b.shape[0]
    loops.share(loops.lpips_kernel, out.numel(), a.numel(), *rows, *numbers)
    return out


@torch.no_grad()
def lpips_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    *,
    first: int = 0,
    shift: int = 0,
    spatial: bool = False,
    above: Tensor | None = None,
    codes: Tensor | None = None,
    window: Pair = (1, 1),
    after_relu: bool = False,
) -> Tensor:
    """As the kernel's launcher of this name."""
    images, channels, height, width = x.shape
    dx = torch.empty((images, height, width, channels), dtype=x.dtype).permute(0, 3, 1, 2)
    if dx.numel() == 0:
        return dx
    columns = height * width if spatial else 1
    factor = 2.0 if spatial else 2.0 / (height * width)
    incoming = (grad[:, first : first + columns] * factor).to(sum_dtype(x.dtype))
    pool = (window[0],) * 2, (window[1],) * 2, (0, 0), (1, 1)
    loops = cpu.compiled_loops()
    if loops is not None:
        x, y = (_looped(channels_last(t)) for t in (x, y))
        out = torch.empty_like(x) if dx.dtype == torch.float16 else dx
        above = x.new_empty(0) if above is None else _looped(channels_last(above))
        codes = above.new_empty(0, dtype=torch.int8) if codes is None else channels_last(codes)
        found = 0 if above.numel() == 0 else 1 if codes.numel() == 0 else 2
        _loop(loops, incoming, x, y, weight, above, codes, out, shift, found, pool, after_relu)
        return out if out is dx else dx.copy_(out)
    if codes is not None and above is not None:
        above = max_pool_bwd(above.to(incoming.dtype), codes, (height, width), *pool)
    partners = y[(torch.arange(images) + shift) % y.shape[0]]
    per_pixel = incoming.repeat(images // grad.shape[0], 1).view(images, 1, *((height, width) if spatial else (1, 1)))
    total = _formula(per_pixel, x.to(incoming.dtype), partners.to(incoming.dtype), weight)
    if above is not None:
        total += above
    return dx.copy_(torch.where(x <= 0, 0, total) if after_relu else total)


def _loop(
    loops: ModuleType,
    incoming: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    above: Tensor,
    codes: Tensor,
    out: Tensor,
    shift: int,
    found: int,
    pool: tuple[Pair, Pair, Pair, Pair],
    after_relu: bool,
) -> None:
    """found: 0 for nothing above, 1 for the gradient of x itself, 2 for that of a pooling."""
    left, right, target = (loops.array(t).reshape(-1, x.shape[1]) for t in (x, y, out))
    size = (x.shape[2], x.shape[3])
    output = (codes.shape[2], codes.shape[3]) if found == 2 else (0, 0)
    loops.share(
        loops.lpips_backward_kernel,
        x.shape[0] * size[0] * size[1],
        x.numel(),
        *(left, right, _weight(weight, x).numpy(), incoming.contiguous().numpy()),
        *(loops.array(above), loops.array(codes), target),
        *(size, output, (shift, y.shape[0]), found, pool, code_table(pool[0]), after_relu),
    )


def _formula(incoming: Tensor, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x; incoming: twice that of each pixel's distance."""
    norm, other = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (x, y))
    u = x / (norm + 1e-10)
    g = incoming * (u - y / (other + 1e-10))
    if weight is not None:
        g *= weight.to(g.dtype).view(1, -1, 1, 1)
    total = g / (norm + 1e-10) - u * ((u * g).sum(1, keepdim=True) / norm)
    return torch.where(norm == 0, 0, total)


def _looped(x: Tensor) -> Tensor:
    """As the loops take it: float16 in float32."""
    return x.float() if x.dtype == torch.float16 else x


def _weight(weight: Tensor | None, x: Tensor) -> Tensor:
    wide = sum_dtype(x.dtype)
    return torch.ones(x.shape[1], dtype=wide) if weight is None else weight.detach().to(wide).contiguous()


@torch.no_grad()
def lpips_images(images: Tensor, shift: Tensor, scale: Tensor, normalize: bool, out: Tensor) -> None:
    """(images - shift) / scale, after 2 * images - 1 with `normalize`, into `out`: one pass, rounded once."""
    factor = (2 if normalize else 1) / scale.view(1, 3, 1, 1)
    offset = (-1.0 if normalize else 0.0) - shift.view(1, 3, 1, 1)
    torch.addcmul(offset / scale.view(1, 3, 1, 1), images, factor, out=out)


@torch.no_grad()
def lpips_images_bwd(grad: Tensor, scale: Tensor, normalize: bool, out: Tensor) -> None:
    """The gradient of `lpips_images`, into `out`."""
    torch.mul(grad, (2 if normalize else 1) / scale.view(1, 3, 1, 1), out=out)

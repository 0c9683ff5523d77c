"""The distances of LPIPS and their gradient, as `fastalex.kernels.lpips` has them; `lpips_images` too.

Where numba is installed, float32 and bfloat16 take its loops; float64 and float16 take the formulas, in float64 and
float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastalex import cpu
from fastalex.cpu.max_pool import max_pool_bwd
from fastalex.reference import feature_distance

Pair = tuple[int, int]


def _last(x: Tensor) -> Tensor:
    return x if x.movedim(1, -1).is_contiguous() else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()
def lpips_fwd(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]], shapes: Sequence[Sequence[int]], spatial: bool = False
) -> Tensor:
    """(N, layers), or with `spatial` (N, pixels of all layers); float32, float64 for float64."""
    maps = [_map(_last(a), _last(b), weight) for a, b, weight in pairs]
    return torch.cat(maps, 1) if spatial else torch.stack([m.mean(1) for m in maps], 1)


def _map(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """(N, pixels)"""
    compiled = cpu.compiled_for(a, b)
    if compiled is None:
        wide = _compute_dtype(a)
        weight = None if weight is None else weight.to(wide)
        return feature_distance(a.to(wide), b.to(wide), weight, spatial=True).flatten(1)
    out = torch.empty(a.shape[0], a.shape[2] * a.shape[3])
    compiled.lpips_fwd(a, b, _weight(weight, a), out)
    return out


def _weight(weight: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape[1]) if weight is None else weight.detach().float().contiguous()


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
    x, y = _last(x), _last(y)
    images, channels, height, width = x.shape
    dx = torch.empty((images, height, width, channels), dtype=x.dtype).permute(0, 3, 1, 2)
    if dx.numel() == 0:
        return dx
    pixels = height * width
    columns = pixels if spatial else 1
    incoming = grad[:, first : first + columns] * (2.0 if spatial else 2.0 / pixels)
    compiled = cpu.compiled_for(x, y, *(() if above is None else (above,)))
    if compiled is not None:
        above, codes = above if above is None else _last(above), codes if codes is None else _last(codes)
        incoming = incoming.contiguous()
        compiled.lpips_bwd(incoming, x, y, _weight(weight, x), above, codes, dx, shift, window, after_relu)
        return dx
    wide = _compute_dtype(x)
    incoming = (
        incoming.to(wide).repeat(images // grad.shape[0], 1).view(images, 1, *((height, width) if spatial else (1, 1)))
    )
    others = y.to(wide)[(torch.arange(images) + shift) % y.shape[0]]
    a = x.to(wide)
    norm, other = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (a, others))
    u, v = a / (norm + 1e-10), others / (other + 1e-10)
    g = incoming * (u - v)
    if weight is not None:
        g *= weight.to(wide).view(1, -1, 1, 1)
    total = g / (norm + 1e-10) - u * ((u * g).sum(1, keepdim=True) / norm)
    total = torch.where(norm == 0, 0, total)
    if codes is not None and above is not None:
        above = max_pool_bwd(  # type: ignore[assignment]
            above, codes, (height, width), (window[0],) * 2, (window[1],) * 2, (0, 0), (1, 1)
        )
    if above is not None:
        total += above
    return dx.copy_(torch.where(a <= 0, 0, total) if after_relu else total)


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

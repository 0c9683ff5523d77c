"""Operators `fastalex::lpips`, the whole perceptual loss as one node of the autograd graph, and
`fastalex::lpips_features`, a trunk's features alone.

One node lets a kernel of the backward pass take, for one feature map, the gradient of its distance, the one that comes
from the layer above, through the pooling between them, and the mask of the ReLU below.  Both images go through the
convolutions as one batch.  Saved: the features, window codes, and one byte per element for ReLUs that are no features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalex import backend, gpu, private
from fastalex.cpu import conv_relu as cpu_conv
from fastalex.cpu import lpips as cpu_lpips
from fastalex.cpu import max_pool
from fastalex.gpu import convolution
from fastalex.ops import conv_relu
from fastalex.ops.common import call, device_of, differentiable, operator, refuse_double_backward
from fastalex.ops.feature_distance import images_last
from fastalex.ops.geometry import Conv as Geometry
from fastalex.ops.trunks import TRUNKS, Conv, Fire, Pool
from fastalex.reference import sum_dtype

NAME = "lpips"


# ------------------------------------------------------------------------------------------------------- the network
class Kept:
    """What the backward pass of a trunk needs, in the order of computation."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.dead: list[Tensor] = []  # where a ReLU that is no feature stops the gradient

    def tensors(self) -> list[Tensor]:
        return [*self.features, *self.codes, *self.dead]

    @classmethod
    def of(cls, tensors: list[Tensor], net: str) -> Kept:
        layers = TRUNKS[net].layers
        kept, features = cls(), sum(layer.tap for layer in layers)
        pools = sum(isinstance(layer, Pool) for layer in layers)
        kept.features, rest = tensors[:features], tensors[features:]
        kept.codes, kept.dead = rest[:pools], rest[pools:]
        return kept


def kernels_for(triton: bool) -> Any:
    """The module of the distances: the Triton kernels, or the CPU's code."""
    return gpu.lpips if triton else cpu_lpips


def square(stride: int, padding: int) -> Geometry:
    return Geometry((stride, stride), (padding, padding), (1, 1), 1)


def conv(x: Tensor, weight_and_bias: Sequence[Tensor], stride: int = 1, padding: int = 0, *, triton: bool) -> Tensor:
    weight, bias = weight_and_bias
    return conv_relu.forward(x, weight, bias, square(stride, padding), triton=triton)


def conv_grad(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: int = 1, padding: int = 0, *, triton: bool
) -> Tensor:
    """The gradient of a convolution's input of this height and width; its values are not needed."""
    if not triton:
        return cpu_conv.conv_input_grad(grad, weight, size, stride, padding)
    shape = (grad.shape[0], weight.shape[1], *size)
    # memory that nobody reads; where the weight is 1x1 the library asks the input for the layout
    input = images_last(shape, grad) if weight[0, 0].numel() == 1 else grad.new_empty(1).expand(shape)
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = convolution.gradients(grad, input, weight, *square(stride, padding), needs=(True, False))[0]
    assert out is not None
    return out.contiguous(memory_format=torch.channels_last)


def features_of(
    x: Tensor, parameters: Sequence[Tensor], net: str, kept: Kept | None, rows: slice, *, triton: bool
) -> Iterator[Tensor]:
    """The features one after the other; what the backward pass of the images `rows` needs goes into `kept`."""
    at = 0
    for layer in TRUNKS[net].layers:
        own = parameters[at : at + layer.parameters]
        at += layer.parameters
        if isinstance(layer, Pool):
            pool = gpu.max_pool.max_pool_fwd if triton else max_pool.max_pool_fwd
            x, codes = pool(
                x, (layer.kernel,) * 2, (layer.stride,) * 2, (0, 0), (1, 1), layer.ceil,
                codes=kept is not None, after_relu=True,
            )  # fmt: skip
            if kept is not None and codes is not None:
                kept.codes.append(codes)
            continue
        if isinstance(layer, Conv):
            x = conv(x, own, layer.stride, layer.padding, triton=triton)
        else:
            x = conv(x, own[:2], triton=triton)
            if kept is not None:
                kept.dead.append(x[rows] <= 0)
            x = torch.cat([conv(x, own[2:4], triton=triton), conv(x, own[4:], 1, 1, triton=triton)], 1)
        if layer.tap:
            if kept is not None:
                kept.features.append(x)
            yield x
        elif kept is not None:
            kept.dead.append(x[rows] <= 0)


def fake_kept(images: int, rows: int, size: Sequence[int], net: str, like: Tensor, dtype: torch.dtype) -> Kept:
    """Uninitialised tensors as `features_of` keeps them."""
    kept, channels = Kept(), 3
    trunk = TRUNKS[net]
    before = tuple(size)
    for layer, after in zip(trunk.layers, trunk.sizes(size), strict=True):
        if isinstance(layer, Pool):
            kept.codes.append(_last((images, channels, *after), like, torch.int8))
        else:
            channels = layer.channels
            if isinstance(layer, Fire):
                kept.dead.append(_last((rows, layer.squeeze, *before), like, torch.bool))
            if layer.tap:
                kept.features.append(_last((images, channels, *after), like, dtype))
            else:
                kept.dead.append(_last((rows, channels, *after), like, torch.bool))
        before = after
    return kept


def _last(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def selected(needs: Sequence[bool], images: int, others: int) -> slice:
    """The images of the batch of both whose gradient is needed."""
    return slice(0 if needs[0] else images, images + others if needs[1] else images)


class Options(NamedTuple):
    """What a schema carries as a list of bools."""

    normalize: bool
    spatial: bool
    first: bool  # whether the first image's gradient is needed
    second: bool

    @property
    def needs(self) -> tuple[bool, bool]:
        return self.first, self.second


def distances(
    image: Tensor,
    other: Tensor | None,
    features: Sequence[Tensor],
    scaling: Sequence[Tensor],
    parameters: Sequence[Tensor],
    weights: Sequence[Tensor],
    net: str,
    options: Options,
) -> tuple[Tensor, list[Tensor]]:
    shift, scale = scaling
    normalize, spatial, *_ = options
    needs = options.needs
    triton = backend.takes_triton(NAME, image)
    kernels = kernels_for(triton)
    images = image.shape[0]
    others = 0 if other is None else other.shape[0]
    x = images_last((images + others, *image.shape[1:]), parameters[0])
    kernels.lpips_images(image, shift, scale, normalize, x[:images])
    if other is not None:
        kernels.lpips_images(other, shift, scale, normalize, x[images:])
    kept = Kept() if any(needs) else None

    def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        maps = features_of(x, parameters, net, kept, selected(needs, images, others), triton=triton)
        for layer, found in enumerate(maps):
            weight = weights[layer] if weights else None
            yield found[:images], features[layer] if other is None else found[images:], weight

    sizes = TRUNKS[net].feature_sizes(image.shape[2:])
    shapes = [(images, c, *size) for c, size in zip(TRUNKS[net].channels, sizes, strict=True)]
    return kernels.lpips_fwd(pairs(), shapes, spatial), [] if kept is None else kept.tensors()


@operator("fastalex::lpips")
def lpips(
    image: Tensor,
    other: Tensor | None,
    features: list[Tensor],
    scaling: list[Tensor],
    parameters: list[Tensor],
    weights: list[Tensor],
    net: str,
    options: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, H, W) and (N or 1, 3, H, W), or instead of the second its features -> the distances and what a
    backward pass needs, nothing unless `options` ask for the gradient of one of the images.

    scaling: shift and scale of the three channels.  options: see `Options`.  parameters: the trunk's; their dtype is
    that of the computation.  weights: of the channels of each feature, or none at all for ones.  The distances are (N,
    features), or with `spatial` (N, P): the maps of all features, one behind the other; float32, float64 for float64.
    """
    with device_of(image):
        return distances(image, other, features, scaling, parameters, weights, net, Options(*options))


@lpips.register_fake
def _(
    image: Tensor,
    other: Tensor | None,
    features: list[Tensor],
    scaling: list[Tensor],
    parameters: list[Tensor],
    weights: list[Tensor],
    net: str,
    options: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    images, size, dtype = image.shape[0], image.shape[2:], parameters[0].dtype
    _, spatial, *needs = options
    others = 0 if other is None else other.shape[0]
    columns = sum(h * w for h, w in TRUNKS[net].feature_sizes(size)) if spatial else len(TRUNKS[net].channels)
    out = image.new_empty((images, columns), dtype=sum_dtype(dtype))
    if not any(needs):
        return out, []
    rows = (images if needs[0] else 0) + (others if needs[1] else 0)
    return out, fake_kept(images + others, rows, size, net, image, dtype).tensors()


@operator("fastalex::lpips_backward")
def lpips_backward(
    grad: Tensor,
    saved: list[Tensor],
    lengths: list[int],
    net: str,
    options: list[bool],
    size: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of (image, other), contiguous, empty where `options` say no.

    saved: so many tensors (`lengths`) of what `lpips` kept, features, scaling, parameters and weights.  size, dtype: of
    the images.
    """
    with device_of(grad):
        kept, features, (_, scale), parameters, weights = parts(saved, lengths)
        normalize, spatial, *needs = options
        trunk = TRUNKS[net]
        found = Kept.of(kept, net)
        images = grad.shape[0]
        others = found.features[0].shape[0] - images
        rows = selected(needs, images, others)
        triton = backend.takes_triton(NAME, grad)
        kernels = kernels_for(triton)
        columns = [0]
        for h, w in trunk.feature_sizes(size):
            columns.append(columns[-1] + (h * w if spatial else 1))
        sizes = [tuple(size), *trunk.sizes(size)]
        above: Tensor | None = None
        pool: dict[str, Any] = {}
        at, tap, codes, dead = (
            sum(layer.parameters for layer in trunk.layers),
            len(trunk.channels),
            len(found.codes),
            len(found.dead),
        )
        for index in reversed(range(len(trunk.layers))):
            layer, before = trunk.layers[index], sizes[index]
            if isinstance(layer, Pool):
                codes -= 1
                pool = {"codes": found.codes[codes][rows], "window": (layer.kernel, layer.stride)}
                continue
            at -= layer.parameters
            if layer.tap:
                tap -= 1
                maps = found.features[tap]
                # the partner of an image: in the other half, the only one, or a feature that was given
                if all(needs):
                    partner, shift = maps, images
                else:
                    partner, shift = features[tap] if features else maps[images:] if needs[0] else maps[:images], 0
                above = kernels.lpips_bwd(
                    grad, maps[rows], partner, weights[tap] if weights else None, first=columns[tap], shift=shift,
                    spatial=spatial, above=above, after_relu=True, **pool,
                )  # fmt: skip
                pool = {}
            else:
                dead -= 1
                above = above.masked_fill_(found.dead[dead], 0)  # type: ignore[union-attr]
            assert above is not None
            if isinstance(layer, Conv):
                above = conv_grad(above, parameters[at], before, layer.stride, layer.padding, triton=triton)
            else:
                dead -= 1
                one, three = above[:, : layer.expand], above[:, layer.expand :]
                above = conv_grad(one, parameters[at + 2], before, triton=triton)
                above += conv_grad(three, parameters[at + 4], before, 1, 1, triton=triton)
                above.masked_fill_(found.dead[dead], 0)
                above = conv_grad(above, parameters[at], before, triton=triton)
        out = []
        for need, part in zip(needs, (slice(0, images), slice(images if needs[0] else 0, None)), strict=True):
            if need:
                out.append(torch.empty((above[part].shape), dtype=dtype, device=grad.device))  # type: ignore[index]
                kernels.lpips_images_bwd(above[part], scale, normalize, out[-1])  # type: ignore[index]
            else:
                out.append(grad.new_empty(0))
        return out[0], out[1]


@lpips_backward.register_fake
def _(
    grad: Tensor,
    saved: list[Tensor],
    lengths: list[int],
    net: str,
    options: list[bool],
    size: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    images, (_, _, *needs) = grad.shape[0], options
    shapes = (images, saved[0].shape[0] - images)
    first, second = (
        grad.new_empty((count, 3, *size), dtype=dtype) if need else grad.new_empty(0)
        for need, count in zip(needs, shapes, strict=True)
    )
    return first, second


def parts(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """The list in pieces of these lengths."""
    left = iter(tensors)
    return [list(islice(left, length)) for length in lengths]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    image, _, features, scaling, parameters, weights, net, options = inputs
    _, kept = output
    ctx.rest = net, options, list(image.shape[2:]), image.dtype
    ctx.lengths = [len(kept), len(features), 2, len(parameters), len(weights)]
    ctx.save_for_backward(*kept, *features, *scaling, *parameters, *weights)
    ctx.mark_non_differentiable(*kept)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not (grad.requires_grad or private.functorch_is_active()):
        # a graph of this pass is wanted, and what is kept does not say that it depends on the images
        grad = grad.detach().requires_grad_()
    grads = call(lpips_backward, grad, list(ctx.saved_tensors), ctx.lengths, *ctx.rest)
    image, other = (g if need else None for g, need in zip(grads, ctx.rest[1][2:], strict=True))
    nothing: list[list[None]] = [[None] * length for length in ctx.lengths]
    return image, other, *nothing[1:], None, None


differentiable(lpips, _setup_context, _backward)
refuse_double_backward(lpips_backward, NAME)


# ---------------------------------------------------------------------------------------------------- features alone
@operator("fastalex::lpips_features")
def lpips_features(
    image: Tensor, scaling: list[Tensor], parameters: list[Tensor], net: str, normalize: bool
) -> list[Tensor]:
    """Images (N, 3, H, W) -> the features that `lpips` compares, channels_last.  No gradient."""
    with device_of(image):
        x = images_last(image.shape, parameters[0])
        triton = backend.takes_triton(NAME, image)
        kernels_for(triton).lpips_images(image, *scaling, normalize, x)
        return list(features_of(x, parameters, net, None, slice(0), triton=triton))


@lpips_features.register_fake
def _(image: Tensor, scaling: list[Tensor], parameters: list[Tensor], net: str, normalize: bool) -> list[Tensor]:
    return fake_kept(image.shape[0], 0, image.shape[2:], net, image, parameters[0].dtype).features

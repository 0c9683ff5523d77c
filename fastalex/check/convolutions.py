"""Convolutions: every candidate of every layer, right and how fast, the library's own among them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import backend
from fastalex.alexnet import AlexNet
from fastalex.check.kernels import DTYPES, compared, random
from fastalex.check.runner import Context, Item, Row
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_INPUT_GRAD, CONV2D_RELU, CONV2D_WEIGHT_GRAD, output_size
from fastalex.gpu.dispatch import Operation
from fastalex.tolerances import SLACK, UNIT_ROUNDOFF, bound
from fastalex.variants import VARIANTS

OPERATIONS = (CONV2D_RELU, CONV2D_INPUT_GRAD, CONV2D_WEIGHT_GRAD)
# more than one tile of images, the last one partial
IMAGES = 130
# channels, height and width, features, kernel, stride, padding, groups
Geometry = tuple[int, int, int, int, int, int, int]


@functools.cache
def layers(small: bool) -> Mapping[str, Geometry]:
    """The convolutions of the AlexNets, each once; on a CPU two small ones."""
    if small:
        return {"strided": (3, 12, 16, 5, 4, 2, 1), "grouped": (32, 4, 32, 3, 1, 1, 2)}
    found: dict[str, Geometry] = {}
    for variant in ("paper", "torchvision"):
        with torch.device("meta"):
            model = AlexNet(variant=VARIANTS[variant])
        side, channels = VARIANTS[variant].crop, 3
        for number, conv in enumerate(model.variant.convs, 1):
            geometry = (channels, side, conv.channels, conv.kernel_size, conv.stride, conv.padding, conv.groups)
            if geometry not in found.values():
                found[f"{variant} conv{number}"] = geometry
            side = (side + 2 * conv.padding - conv.kernel_size) // conv.stride + 1
            side = (side - conv.pool) // conv.pool_stride + 1 if conv.pool else side
            channels = conv.channels
    return found


def precision_of(dtype: str) -> Any:
    """Sets what fp32 products may be: "tf32" or, for all else, "ieee"."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[attr-defined]


def arguments(operation: Operation, layer: str, dtype: str, images: int, context: Context) -> tuple[Any, ...]:
    """What the operation is called with; the weight's scale keeps outputs near 1."""
    channels, side, features, kernel, stride, padding, groups = layers(context.small)[layer]
    real = DTYPES["fp32" if dtype == "tf32" else dtype]
    geometry = ([stride] * 2, [padding] * 2, [1, 1], groups)
    last = torch.channels_last
    x = random((images, channels, side, side), real, context.device).contiguous(memory_format=last)
    fan = channels // groups * kernel**2
    weight = random((features, channels // groups, kernel, kernel), torch.float32, context.device, 1) / fan**0.5
    weight = weight.to(real).contiguous(memory_format=last)
    if operation is CONV2D_RELU:
        return (x, weight, random((features,), real, context.device, 2), *geometry)
    shape = (images, features, *output_size(x.shape[2:], weight.shape[2:], *geometry[:3]))
    return (random(shape, real, context.device, 3).contiguous(memory_format=last), x, weight, *geometry)


@functools.lru_cache(maxsize=1)
def truth(name: str, layer: str, dtype: str, images: int, context: Context) -> tuple[Tensor, Tensor]:
    """The float64 result of an operation and the bound of each element."""
    operation = dispatch.find(name)
    args = arguments(operation, layer, dtype, images, context)
    real, geometry = args[0].dtype, args[-4:]

    def computed(tensors: tuple[Tensor, ...]) -> Tensor:
        first, second, third = (t.double() for t in tensors)
        if operation is CONV2D_RELU:
            return F.conv2d(first, second, third, *geometry)
        of_input = operation is CONV2D_INPUT_GRAD
        return torch.ops.aten.convolution_backward(
            first, second, third, None, *geometry[:3], False, [0, 0], geometry[3], [of_input, not of_input, False]
        )[0 if of_input else 1]

    expected = computed(args[:3])
    magnitude = computed(tuple(t.abs() for t in args[:3]))
    if operation is CONV2D_RELU:
        expected, terms = expected.relu(), args[1][0].numel() + 1
    elif operation is CONV2D_INPUT_GRAD:
        terms = args[2][:, 0].numel() // geometry[3]
    else:
        terms = args[0][:, 0].numel()
    if dtype == "tf32":
        # factors lose what is behind their 10 bits
        magnitude = magnitude * (1 + 2.01 * 2**-10 / (UNIT_ROUNDOFF[torch.float32] * (terms + SLACK)))
    limit = bound(expected, real, terms=terms, magnitude=magnitude)
    if operation is CONV2D_RELU and real != torch.float32:
        # the library's convolution is rounded before the bias is added
        bias = args[2].double().abs()[:, None, None]
        limit = limit + UNIT_ROUNDOFF[real] * (expected.abs() + bias)
    return expected, limit


def check_candidate(operation: Operation, layer: str, dtype: str, name: str, context: Context) -> Row:
    precision_of(dtype)
    images = 2 if context.small else IMAGES
    args = arguments(operation, layer, dtype, images, context)
    candidate = operation.candidates[name]
    with backend.use("triton"):
        reason = candidate.unsupported(*args)
        if reason is not None:
            return {"refused": reason}
        found, again = candidate.run(*args), candidate.run(*args)
        keeps_nan = dispatch.keeps_nan(operation, candidate, args)
    row = compared([(found, *truth(operation.name, layer, dtype, images, context))]) | {"keeps_nan": keeps_nan}
    if "triton" in name:
        return {**row, "repeats": torch.equal(found, again)}
    # the library's rounding is its own affair: told, and held to a wrong result's distance
    return {**row, "ok": row["ok"] or row["error"] <= dispatch.TOLERANCES[found.dtype] * found.abs().max().item()}


def values(context: Context) -> dict[str, Item]:
    """Layers of a dtype stay in one process, which keeps the float64 result from candidate to candidate."""
    dtypes = ("fp32",) if context.small else ("fp16", "bf16", "tf32", "fp32")
    return {
        f"{layer} {dtype}/{operation.name} {name}": partial(check_candidate, operation, layer, dtype, name, context)
        for dtype in dtypes
        for layer in layers(context.small)
        for operation in OPERATIONS
        if not (operation is CONV2D_INPUT_GRAD and layers(context.small)[layer][0] == 3)
        for name in operation.candidates
        # the library is what fp32 needs least of all to be told about
        if not (dtype == "fp32" and not context.small and "library" in name)
    }


def time_layer(operation: Operation, layer: str, dtype: str, images: int, benchmark: bool, context: Context) -> Row:
    """Milliseconds of each candidate, which of them is to be taken, and why the others are not."""
    precision_of(dtype)
    torch.backends.cudnn.benchmark = benchmark
    args = arguments(operation, layer, dtype, images, context)
    if not context.timed:
        for candidate in operation.candidates.values():
            if candidate.unsupported(*args) is None:
                candidate.run(*args)
        return {}
    measured = dispatch.tune(operation, *args)
    return {
        "chosen": measured.candidate,
        "default": next(name for name in operation.defaults(*args) if name in measured.milliseconds),
        "ms": measured.milliseconds,
        "refused": measured.refused,
        "key": dispatch.table_key(operation, dispatch.flags(), args),
        "where": dispatch.environment(args[0].device),
    }


def times(context: Context) -> dict[str, Item]:
    if context.small:
        return {}
    return {
        f"{layer} {dtype} {images}/{operation.name}": partial(
            time_layer, operation, layer, dtype, images, True, context
        )
        for images, dtype in ((128, "fp16"), (128, "bf16"), (1, "fp16"))
        for layer in layers(False)
        for operation in OPERATIONS
        if not (operation is CONV2D_INPUT_GRAD and layers(False)[layer][0] == 3)
        # training's dtype for the paper's network, one image for inference alone
        if (images > 1 or operation is CONV2D_RELU) and (dtype == "fp16" or layer.startswith("paper"))
    }

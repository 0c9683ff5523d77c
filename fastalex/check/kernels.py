"""LRN, pooling and the passes around convolutions: right, repeatable, and how near to the speed of a copy."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import functional, reference
from fastalex.check.runner import Context, Item, Row
from fastalex.tolerances import UNIT_ROUNDOFF, bound, errors

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
# The paper's: size, alpha (torch's, of a mean), beta, k.
NORM = (5, 5e-4, 0.75, 2.0)
# Channels, height and width of what comes in, in the AlexNets.
SHAPES = {
    "lrn": ((96, 55), (256, 27)),
    "max_pool": ((96, 55), (256, 27), (256, 13)),
    "lrn_max_pool": ((96, 55), (256, 27)),
}
SMALL_SHAPES = {"lrn": ((24, 5),), "max_pool": ((24, 7),), "lrn_max_pool": ((24, 7),)}

Both = tuple[Tensor, Tensor]


def shapes(operation: str, context: Context) -> Sequence[tuple[int, int]]:
    return (SMALL_SHAPES if context.small else SHAPES)[operation]


def random(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Of unit variance, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device).to(dtype)


def compared(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Row:
    """Of (result, float64 truth, bound of each element): the largest error, absolute and in units of its bound."""
    worst, largest = 0.0, 0.0
    for actual, expected, limit in pairs:
        if actual.shape != expected.shape:
            return {"ok": False, "why": f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"}
        if expected.numel():
            worst = max(worst, errors(actual, expected, limit).max().item())
            largest = max(largest, (actual.double() - expected).abs().nan_to_num(torch.inf).max().item())
    finite = largest < float("inf")
    return {"ok": worst <= 1, "error": largest if finite else "inf", "of_bound": worst if worst < 1e30 else "inf"}


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(first, second, strict=True)
    )


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within the block the kernels run without inline PTX."""
    names = ("lrn", "max_pool", "lrn_max_pool")
    modules: list[Any] = [importlib.import_module(f"fastalex.kernels.{name}") for name in names]
    before = [module.use_asm for module in modules]
    for module in modules:
        module.use_asm = lambda: False
    try:
        yield
    finally:
        for module, use in zip(modules, before, strict=True):
            module.use_asm = use


# ------------------------------------------------------------------------------------------------------ LRN, pooling
OURS: dict[str, Callable[[Tensor], Any]] = {
    "lrn": lambda x: functional.local_response_norm(x, *NORM),
    "max_pool": lambda x: functional.max_pool2d(x, 3, 2),
    "lrn_max_pool": lambda x: functional.lrn_max_pool2d(x, *NORM, after_relu=True),
}
EAGER: dict[str, Callable[[Tensor], Any]] = {
    "lrn": lambda x: F.local_response_norm(x, *NORM),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2),
    "lrn_max_pool": lambda x: F.max_pool2d(F.local_response_norm(x, *NORM), 3, 2),
}
TRUTH: dict[str, Callable[[Tensor], Any]] = {
    "lrn": lambda x: reference.local_response_norm(x, *NORM),
    "max_pool": lambda x: reference.max_pool2d(x, 3, 2),
    "lrn_max_pool": lambda x: reference.lrn_max_pool2d(x, *NORM),
}


def both(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Both:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def window_sums(v: Tensor, below: int, above: int) -> Tensor:
    """Sums over the channels [c - below, c + above]."""
    return F.pad(v.movedim(1, -1), (below, above)).unfold(-1, below + 1 + above, 1).sum(-1).movedim(-1, 1)


def gradient_magnitude(grad: Tensor, x: Tensor) -> Tensor:
    """The sum of the absolute values that an LRN's input gradient is made of, in float64."""
    size, alpha, beta, k = NORM
    below, above = size // 2, (size - 1) // 2
    d = k + alpha / size * window_sums(x.square(), below, above)
    terms = (grad * x).abs() * d ** (-beta - 1)
    return grad.abs() * d**-beta + 2 * beta * alpha / size * x.abs() * window_sums(terms, above, below)


def clear_winners(x: Tensor) -> Tensor:
    """True where rounding cannot change which cell of a 3x3 window is the largest after LRN; zeros alone are clear."""
    cells = reference.local_response_norm(x.double(), *NORM).unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2)
    first, second = cells.topk(2).values.unbind(-1)
    return (first - second > 6 * UNIT_ROUNDOFF[x.dtype] * first.abs()) | (first == 0)


def truth(operation: str, x: Tensor, grad: Tensor, fused: bool) -> list[tuple[Tensor, Tensor]]:
    """(value, bound) of output and gradient in float64, for a result in x's dtype.

    fused: no gradient of normalised values is rounded to that dtype on its way, as it is between two operators.
    """
    wide, wide_grad = x.double(), grad.double()
    output, dx = both(TRUTH[operation], wide, wide_grad)
    terms = NORM[0]
    if operation == "max_pool":
        _, magnitude = both(TRUTH[operation], wide, wide_grad.abs())
        return [(output, torch.zeros_like(output)), (dx, bound(dx, x.dtype, terms=4, magnitude=magnitude))]
    if operation == "lrn":
        magnitude = gradient_magnitude(wide_grad, wide)
    else:
        # the gradient before the ReLU; and what comes out of the pooling, as the LRN's gradient
        dx = dx * (x > 0)
        normalised = reference.local_response_norm(wide, *NORM)
        _, inner = both(TRUTH["max_pool"], normalised, wide_grad.abs())
        magnitude = gradient_magnitude(inner, wide)
    limit = bound(dx, x.dtype, terms=2 * terms + 4, magnitude=magnitude)
    if not fused:
        limit = limit + UNIT_ROUNDOFF[x.dtype] * magnitude
    return [(output, bound(output, x.dtype, terms=terms)), (dx, limit)]


def check_operation(operation: str, shape: tuple[int, ...], dtype: str, layout: str, context: Context) -> Row:
    """Output and gradient against float64, two runs bit for bit, and with and without inline PTX bit for bit."""
    x = random(shape, DTYPES[dtype], context.device)
    if operation != "lrn":
        x = x.relu()
    x = x.contiguous(memory_format=LAYOUTS[layout])
    grad = random(TRUTH[operation](x.double()).shape, x.dtype, context.device, 1)
    if operation == "lrn_max_pool":
        # in half precision many windows have two largest cells but for rounding: no gradient goes there
        grad = grad * clear_winners(x)
    grad = grad.contiguous(memory_format=LAYOUTS[layout])
    found, again = both(OURS[operation], x, grad), both(OURS[operation], x, grad)
    fused = operation == "lrn" or layout == "channels_last"
    pairs = [(f, *t) for f, t in zip(found, truth(operation, x, grad, fused), strict=True)]
    row = {**compared(pairs), "repeats": equal(found, again)}
    if context.device == "cuda":
        with portable():
            row["portable_equal"] = equal(found, both(OURS[operation], x, grad))
    return row


def values(operation: str, context: Context) -> dict[str, Item]:
    return {
        f"{dtype} {layout}/{batch}x{channels}x{side}x{side}": partial(
            check_operation, operation, (batch, channels, side, side), dtype, layout, context
        )
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels, side in shapes(operation, context)
        for batch in (1, 5)
    }


# --------------------------------------------------------------------------------------------------- small kernels
def kernels_of(context: Context, name: str) -> Any:
    """The module of launchers: Triton's, which on a CPU the interpreter runs."""
    return importlib.import_module(f"fastalex.kernels.{name}")


def check_bias_relu(shape: tuple[int, ...], dtype: str, context: Context) -> Row:
    x, bias = random(shape, DTYPES[dtype], context.device), random(shape[1:2], DTYPES[dtype], context.device, 1)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    spread = bias.double().reshape(1, -1, *[1] * (len(shape) - 2))
    expected = (x.double() + spread).relu()
    magnitude = x.double().abs() + spread.abs()
    limit = bound(expected, x.dtype, terms=2, magnitude=magnitude, truncates=context.small)
    run = kernels_of(context, "bias_relu").bias_relu_
    return {**compared([(run(x.clone(), bias), expected, limit)]), "repeats": True}


def check_dropout(context: Context) -> Row:
    """The share that is kept, what is kept, and that another seed keeps others."""
    shape = (16, 64) if context.small else (256, 4096)
    run = kernels_of(context, "bias_relu").bias_relu_
    x = random(shape, torch.float16, context.device).abs_() + 1
    seeds = [torch.full((1,), seed, dtype=torch.int64, device=context.device) for seed in (1, 2)]
    first, again, other = (run(x.clone(), None, p=0.5, seed=seed) for seed in (seeds[0], seeds[0], seeds[1]))
    kept = first != 0
    share = kept.double().mean().item()
    # five standard deviations of a fair coin
    fair = abs(share - 0.5) <= 2.5 / x.numel() ** 0.5
    doubled = torch.equal(first[kept], (2 * x)[kept])
    return {"ok": fair and doubled and not equal([first], [other]), "kept": share, "repeats": equal([first], [again])}


def check_relu_bias_grad(shape: tuple[int, ...], dtype: str, context: Context) -> Row:
    y, grad = random(shape, DTYPES[dtype], context.device).relu_(), random(shape, DTYPES[dtype], context.device, 1)
    if len(shape) == 4:
        y, grad = (t.contiguous(memory_format=torch.channels_last) for t in (y, grad))
    run = kernels_of(context, "relu_bias_grad").relu_bias_grad
    found, again = run(grad, y), run(grad, y)
    dz = grad.double() * (y > 0)
    others = [d for d in range(len(shape)) if d != 1]
    db, magnitude = dz.sum(others), dz.abs().sum(others)
    terms = y.numel() // shape[1]
    pairs = [
        (found[0], dz, bound(dz, y.dtype, truncates=context.small)),
        (found[1], db, bound(db, torch.float32, terms=terms, magnitude=magnitude)),
    ]
    return {**compared(pairs), "repeats": equal(found, again)}


def check_sum_partials(rows: int, channels: int, context: Context) -> Row:
    partials = random((rows, channels), torch.float32, context.device)
    run = kernels_of(context, "partial_sums").sum_partials
    found, again = run(partials), run(partials)
    expected = partials.double().sum(0)
    limit = bound(expected, torch.float32, terms=rows, magnitude=partials.double().abs().sum(0))
    return {**compared([(found, expected, limit)]), "repeats": equal([found], [again])}


def check_space_to_depth(dtype: str, context: Context) -> Row:
    """With conv1's geometry: the convolution of the blocks is that of the image."""
    module = kernels_of(context, "space_to_depth")
    side, out = (16, 4) if context.small else (224, 55)
    x = random((3, 3, side, side), DTYPES[dtype], context.device)
    after = (out - 1 + 3) * 4 - side - 2
    padding = ((2, after), (2, after))
    found = module.space_to_depth(x, 4, padding)
    padded = F.pad(x, (2, after, 2, after))
    blocks = padded.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    return {"ok": equal([found], [blocks]), "error": 0.0, "of_bound": 0.0, "repeats": True}


def check_augment(block: int, context: Context) -> Row:
    """Against the same function on the CPU, which is PyTorch's."""
    from fastalex.data.augmentation import augment
    from fastalex.data.preprocessing import Preprocessing

    side, crop = (24, 16) if context.small else (256, 224)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    indices = torch.arange(5) * 7919
    preprocessing = Preprocessing(resize=side, crop=crop, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    padding = ((2, 2), (2, 2)) if block == 4 else ((0, 0), (0, 0))
    options: Any = {"block": block, "padding": padding, "dtype": torch.float32}
    expected = augment(images, indices, 3, preprocessing, **options).double()
    found = augment(images.to(context.device), indices, 3, preprocessing, **options)
    limit = bound(expected, torch.float32, terms=2, magnitude=expected.abs() + 3)
    # and of the same pictures in another order, by their places
    order = torch.tensor([3, 1, 4, 0, 2])
    placed = images[order].contiguous(memory_format=torch.channels_last).to(context.device)
    slots = order.argsort().to(context.device)
    again = augment(placed, indices, 3, preprocessing, slots=slots, **options)
    return {**compared([(found.cpu(), expected, limit)]), "repeats": equal([found], [again])}


def small_kernels(context: Context) -> dict[str, Item]:
    maps, hidden = ((2, 16, 5, 5), (3, 32)) if context.small else ((5, 384, 13, 13), (5, 4096))
    items: dict[str, Item] = {}
    for dtype in DTYPES:
        for shape in (maps, hidden):
            name = "x".join(map(str, shape))
            items[f"bias_relu/{dtype} {name}"] = partial(check_bias_relu, shape, dtype, context)
            items[f"relu_bias_grad/{dtype} {name}"] = partial(check_relu_bias_grad, shape, dtype, context)
        items[f"space_to_depth/{dtype}"] = partial(check_space_to_depth, dtype, context)
    items["bias_relu/dropout"] = partial(check_dropout, context)
    for rows, channels in ((3, 5), (300, 24)) if context.small else ((1, 96), (7168, 96), (57344, 96), (1_100_000, 12)):
        items[f"relu_bias_grad/sum_partials {rows}x{channels}"] = partial(check_sum_partials, rows, channels, context)
    for block in (1, 4):
        items[f"augment/block {block}"] = partial(check_augment, block, context)
    return items


# --------------------------------------------------------------------------------------------------------- bandwidth
@functools.cache
def copy_rate(device: str) -> float:
    """GB/s, read and written, of a copy of random data that fits into no cache."""
    context = Context(device)
    source = random((1 << (28 if device == "cuda" else 22),), torch.float32, device)
    target = torch.empty_like(source)
    milliseconds = context.milliseconds(lambda: target.copy_(source))
    assert milliseconds is not None
    return 2 * source.nbytes / milliseconds / 1e6


def bytes_moved(operation: str, direction: str, x: Tensor, y: Tensor) -> int:
    """That the operation must read and write: inputs, outputs and one byte per window."""
    codes = 0 if operation == "lrn" else y.numel()
    if direction == "forward":
        return x.nbytes + y.nbytes + codes
    return y.nbytes + codes + x.nbytes + (0 if operation == "max_pool" else x.nbytes)


def timed(run: Callable[[], Any], moved: int, context: Context, prefix: str = "") -> Row:
    """Milliseconds, GB/s and percent of a copy."""
    milliseconds = context.milliseconds(run)
    if milliseconds is None:
        return {}
    rate = moved / milliseconds / 1e6
    return {
        f"{prefix}ms": round(milliseconds, 5),
        f"{prefix}gb_s": round(rate, 1),
        f"{prefix}percent_of_copy": round(100 * rate / copy_rate(context.device), 1),
    }


def time_operation(operation: str, direction: str, shape: tuple[int, ...], dtype: str, context: Context) -> Row:
    """Ours, ours without inline PTX, and PyTorch's operations in both layouts, as milliseconds of the device."""
    x = random(shape, DTYPES[dtype], context.device).relu_().contiguous(memory_format=torch.channels_last)

    def running(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Callable[[], Any], Tensor]:
        leaf = x.detach().requires_grad_()
        output = function(leaf)
        if direction == "forward":
            # with what a backward needs
            return lambda: function(leaf), output
        grad = random(output.shape, x.dtype, context.device, 1)
        grad = grad.contiguous(memory_format=LAYOUTS["nchw" if x.is_contiguous() else "channels_last"])
        return lambda: torch.autograd.grad(output, leaf, grad, retain_graph=True), output

    run, output = running(OURS[operation], x)
    moved = bytes_moved(operation, direction, x, output)
    row = timed(run, moved, context)
    if context.device == "cuda" and operation != "lrn":
        with portable():
            run, output = running(OURS[operation], x)
            row |= timed(run, moved, context, "portable_")
    for name, given in (("eager", x), ("eager_nchw", x.contiguous())) if context.timed else ():
        run, output = running(EAGER[operation], given)
        milliseconds = context.milliseconds(run)
        if milliseconds is not None:
            row[f"{name}_ms"] = round(milliseconds, 5)
    return row


def time_pass(name: str, context: Context) -> Row:
    """The passes around a convolution or product, at batch 128 in fp16; eager's are those that they replace."""
    batch = 2 if context.small else 128
    maps = (batch, 96, 55, 55) if not context.small else (2, 16, 5, 5)
    like = {"dtype": torch.float16, "device": context.device}
    if name == "sum_partials":
        rows = 300 if context.small else 7168
        partials = random((rows, maps[1]), torch.float32, context.device)
        module = kernels_of(context, "partial_sums")
        row = timed(lambda: module.sum_partials(partials), partials.nbytes, context)
        eager = context.milliseconds(lambda: partials.sum(0))
    elif name == "bias_relu":
        x = random(maps, torch.float16, context.device).contiguous(memory_format=torch.channels_last)
        bias = torch.zeros(maps[1], **like)  # type: ignore[call-overload]
        module = kernels_of(context, "bias_relu")
        row = timed(lambda: module.bias_relu_(x, bias), 2 * x.nbytes, context)
        eager = context.milliseconds(lambda: x.add_(bias[:, None, None]).relu_())
    elif name == "relu_bias_grad":
        y = random(maps, torch.float16, context.device).relu_().contiguous(memory_format=torch.channels_last)
        grad = random(maps, torch.float16, context.device, 1).contiguous(memory_format=torch.channels_last)
        module = kernels_of(context, "relu_bias_grad")
        row = timed(lambda: module.relu_bias_grad(grad, y), 3 * y.nbytes, context)
        eager = context.milliseconds(lambda: torch.ops.aten.threshold_backward(grad, y, 0).sum((0, 2, 3)))
    elif name == "space_to_depth":
        side = 16 if context.small else 224
        x = random((batch, 3, side, side), torch.float16, context.device)
        module = kernels_of(context, "space_to_depth")
        out = module.space_to_depth(x, 4, ((2, 2), (2, 2)))
        row = timed(lambda: module.space_to_depth(x, 4, ((2, 2), (2, 2))), x.nbytes + out.nbytes, context)
        eager = context.milliseconds(lambda: x.contiguous(memory_format=torch.channels_last))
    else:
        side, crop = (24, 16) if context.small else (256, 224)
        pictures = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=context.device)
        pictures = pictures.permute(0, 3, 1, 2)
        index = torch.arange(batch, device=context.device)
        seed = torch.zeros(1, dtype=torch.int64, device=context.device)
        ones = (1.0, 1.0, 1.0)
        module = kernels_of(context, "augment")
        moved = batch * 3 * crop * crop * (1 + 2)
        row = timed(lambda: module.augment(pictures, index, seed, crop, ones, ones, (ones,) * 3), moved, context)
        eager = None
    if eager is not None:
        row["eager_ms"] = round(eager, 5)
    return row


PASSES = ("bias_relu", "relu_bias_grad", "sum_partials", "space_to_depth", "augment")


def bandwidth(context: Context) -> dict[str, Item]:
    batches = (2,) if context.small else (128, 1024)
    items: dict[str, Item] = {
        f"{operation}/{direction} {batch}x{channels}x{side}x{side} {dtype}": partial(
            time_operation, operation, direction, (batch, channels, side, side), dtype, context
        )
        for batch in batches
        for operation in OURS
        for channels, side in shapes(operation, context)
        for direction in ("forward", "backward")
        for dtype in ({2: ("fp32",), 128: ("fp16", "fp32"), 1024: ("fp16",)})[batch]
    }
    if context.device == "cuda":
        items |= {f"{name}/128 fp16": partial(time_pass, name, context) for name in PASSES}
    return items

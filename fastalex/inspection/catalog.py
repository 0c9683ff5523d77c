"""Every kernel launch of the AlexNet variants, for tools that have neither a model nor a GPU.

An entry is one call of a launcher: operation, layer, direction, dtype, memory format.  What it launches (kernels,
grids, arguments, constants) is not written down anywhere: `launches` calls the launcher on meta tensors and records.

The geometries are data here, because kernels know no models; a test runs each model and compares.
"""

import contextlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from triton.runtime.jit import KernelInterface

from fastalex.alexnet import AlexNet, parameter_shapes
from fastalex.kernels import (
    augment,
    bias_relu,
    lpips,
    lrn,
    lrn_max_pool,
    lrn_max_pool_backward,
    max_pool,
    partial_sums,
    relu_bias_grad,
    sgd,
    space_to_depth,
)
from fastalex.kernels.convolution import forward, input_grad, weight_grad
from fastalex.kernels.geometry import output_size
from fastalex.variants import VARIANTS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
# The batch of the paper, and of every number that depends on one.
BATCH = 128
# Training pictures of ILSVRC 2012: 252 GB at 256x256.
IMAGENET = 1_281_167
POOL = ((3, 3), (2, 2), (0, 0), (1, 1))


def windows(side, kernel, stride, padding=0):
    """The side of a square map's output."""
    return output_size((side,), (kernel,), (stride,), (padding,), (1,))[0]


@dataclass(frozen=True)
class Entry:
    """One call of a launcher.

    operation: the module of the kernel.  direction: "forward" (of training), "inference" (no window codes) or
    "backward".  side: height and width of the launcher's largest tensor; 1 for a matrix of features.  norm: (size,
    alpha, beta, k, groups) of the LRN.  fused: the call belongs to a fused stage: after the ReLU, backward with the
    partial sums of the bias gradient.  dropout: its probability.  padding: of images, ((top, bottom), (left, right)).
    """

    variant: str
    layer: str
    operation: str
    direction: str
    channels: int
    side: int
    norm: tuple[Any, ...] = ()
    fused: bool = False
    dropout: float = 0.0
    padding: tuple = ()
    dtype: str = "fp16"
    layout: str = "channels_last"

    @property
    def name(self):
        return "/".join((self.variant, self.layer, self.operation, self.direction, self.dtype, self.layout))

    @property
    def batch(self):
        return BATCH

    @property
    def image_elements(self):
        """Elements per image of the largest tensor: what work and traffic are divided by."""
        return self.channels * self.side**2

    flops = 0  # of matrix products, per element

    def tensor(self, side, batch, device, dtype=None):
        """A tensor of zeros with this entry's channels; (batch, channels) for a matrix of features."""
        shape = (batch, self.channels, side, side) if self.side > 1 else (batch, self.channels)
        out = torch.zeros(shape, dtype=dtype or DTYPES[self.dtype], device=device)
        return out.to(memory_format=LAYOUTS[self.layout]) if self.side > 1 else out

    def call(self, batch=None, device="meta"):
        """Call the launcher on tensors of zeros, as the operator does."""
        batch = batch or self.batch
        if self.operation == "space_to_depth":
            # images come as they are decoded and batched, channel by channel
            images = torch.zeros(batch, self.channels, self.side, self.side, dtype=DTYPES[self.dtype], device=device)
            space_to_depth.space_to_depth(images, 4, self.padding)
            return
        x = self.tensor(self.side, batch, device)
        pooled = windows(self.side, 3, 2)
        if self.operation == "bias_relu":
            bias = torch.zeros(self.channels, dtype=x.dtype, device=device)
            seed = torch.zeros(1, dtype=torch.int64, device=device) if self.dropout else None
            bias_relu.bias_relu_(x, bias, p=self.dropout, seed=seed)
        elif self.operation == "relu_bias_grad":
            relu_bias_grad.relu_bias_grad(torch.zeros_like(x), x, scale=1 / (1 - self.dropout))
        elif self.operation == "lrn" and self.direction == "backward":
            lrn.lrn_bwd(torch.zeros_like(x), x, *self.norm)
        elif self.operation == "lrn":
            lrn.lrn_fwd(x, *self.norm)
        elif self.direction == "backward":
            grad = self.tensor(pooled, batch, device)
            codes = self.tensor(pooled, batch, device, torch.int8)
            partials: Any = self.fused  # which overload it is, a type checker need not know
            if self.operation == "max_pool":
                out = max_pool.max_pool_bwd(grad, codes, (self.side, self.side), *POOL, bias_partials=partials)
            else:
                *norm, groups = self.norm
                out = lrn_max_pool_backward.lrn_max_pool_bwd(
                    grad, codes, x, *norm, groups=groups, bias_partials=self.fused
                )
            if self.fused:
                partial_sums.sum_partials(out[1])
        else:
            codes = self.direction == "forward"
            if self.operation == "max_pool":
                max_pool.max_pool_fwd(x, *POOL, False, codes=codes, after_relu=self.fused)
            else:
                *norm, groups = self.norm
                lrn_max_pool.lrn_max_pool_fwd(x, *norm, groups=groups, codes=codes, after_relu=self.fused)


@dataclass(frozen=True)
class ConvEntry:
    """One call of `conv_relu` by one of its algorithms.

    channels, side: of the input; features: of the output; kernel, stride and padding: of both dimensions.
    batch: for which the algorithm is meant.  precision: of fp32's products.
    """

    variant: str
    layer: str
    channels: int
    side: int
    features: int
    kernel: int
    stride: int
    padding: int
    groups: int
    algorithm: str = ""
    dtype: str = "fp16"
    precision: str = "ieee"
    operation: str = "conv_relu"
    direction: str = "forward"
    layout: str = "channels_last"

    @property
    def name(self):
        """As an `Entry`'s, with the algorithm for the direction and tf32 for a dtype."""
        kind = "tf32" if self.precision == "tf32" else self.dtype
        return "/".join((self.variant, self.layer, self.operation, self.algorithm, kind, self.layout))

    @property
    def batch(self):
        return {"spatial": 32, "split_k": 1}.get(self.algorithm, 2 * BATCH)

    @property
    def out_side(self):
        return windows(self.side, self.kernel, self.stride, self.padding)

    @property
    def image_elements(self):
        """Elements per image of the output."""
        return self.features * self.out_side**2

    @property
    def flops(self):
        """Of matrix products, per element of the output."""
        return 2 * self.channels // self.groups * self.kernel**2

    @property
    def shape(self):
        """What all algorithms and dtypes of a layer have in common: the fields from `variant` to `groups`."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:9]}

    @property
    def geometry(self):
        """Stride, padding, dilation and groups as the launcher takes them."""
        return (self.stride,) * 2, ((self.padding,) * 2,) * 2, (1, 1), self.groups

    def tensors(self, batch=None, device="meta"):
        """x, weight and bias of zeros."""
        like = {"dtype": DTYPES[self.dtype], "device": device}
        x = torch.zeros(batch or self.batch, self.channels, self.side, self.side, **like)
        weight = torch.zeros(self.features, self.channels // self.groups, self.kernel, self.kernel, **like)
        last = torch.channels_last
        return (
            x.contiguous(memory_format=last),
            weight.contiguous(memory_format=last),
            torch.zeros(self.features, **like),
        )

    def call(self, batch=None, device="meta"):
        x, weight, bias = self.tensors(batch, device)
        forward.conv_relu(x, weight, bias, *self.geometry, algorithm=self.algorithm, precision=self.precision)


@dataclass(frozen=True)
class ConvGradEntry(ConvEntry):
    """One call of a convolution's gradient; elements are those of the output, whose gradient comes in.

    algorithm: "input_grad", with the mask of a ReLU below and the partial sums of its bias gradient, or "weight_grad",
    or one of them followed by "_descriptors".
    """

    operation: str = "conv_backward"
    direction: str = "backward"

    @property
    def grad(self):
        return self.algorithm.removesuffix("_descriptors")

    def call(self, batch=None, device="meta"):
        x, weight, _ = self.tensors(batch, device)
        grad = torch.zeros(x.shape[0], self.features, self.out_side, self.out_side, dtype=x.dtype, device=device)
        grad = grad.contiguous(memory_format=torch.channels_last)
        options = {"descriptors": self.algorithm != self.grad, "precision": self.precision}
        if self.grad == "input_grad":
            _, partials = input_grad.conv_input_grad(
                grad, weight, x.shape[2:], *self.geometry, relu_output=x, bias_partials=True, **options
            )
            partial_sums.sum_partials(partials)
        else:
            weight_grad.conv_weight_grad(grad, x, weight.shape[2:], *self.geometry, **options)


@dataclass(frozen=True)
class AugmentEntry:
    """One call of `augment`: crops of 224 pixels of pictures of 256, blocks of 4 x 4 pixels if `block` is 4.

    resident: of pictures of a set as large as ImageNet's, by their slots, with labels; a meta tensor weighs nothing.
    direction: "forward", or "inference": ten crops of each picture, that nobody draws.
    """

    block: int
    resident: bool = False
    dtype: str = "fp16"
    variant: str = "paper"
    operation: str = "augment"
    direction: str = "forward"
    layout: str = "channels_last"
    batch: int = BATCH

    @property
    def layer(self):
        if self.direction == "inference":
            return "ten_crops"
        return ("resident" if self.resident else "pictures") + ("_space_to_depth" if self.block == 4 else "")

    @property
    def name(self):
        return "/".join((self.variant, self.layer, self.operation, self.direction, self.dtype, self.layout))

    @property
    def side(self):
        return 57 if self.block == 4 else 224

    @property
    def image_elements(self):
        """Elements per image of the output."""
        return 3 * self.block**2 * self.side**2 * (10 if self.direction == "inference" else 1)

    def call(self, batch=None, device="meta"):
        batch = batch or self.batch
        count = IMAGENET if self.resident and device == "meta" else batch
        pictures = torch.zeros(count, 256, 256, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        index = torch.zeros(batch, dtype=torch.int64, device=device)
        gathered = {}
        if self.resident:
            gathered = {"slots": index, "labels": torch.zeros(count, dtype=torch.int64, device=device)}
        padding = ((2, 2), (2, 2)) if self.block == 4 else ((0, 0), (0, 0))
        ones = (1.0, 1.0, 1.0)
        if self.direction == "inference":
            places = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
            corners = [(top, left, mirrored) for mirrored in (False, True) for top, left in places]
            augment.crops(pictures, corners, 224, ones, ones, dtype=DTYPES[self.dtype], slots=index)
            return
        augment.augment(
            pictures, index, index[:1], 224, ones, ones, (ones,) * 3,
            block=self.block, padding=padding, dtype=DTYPES[self.dtype], **gathered,
        )  # fmt: skip


@dataclass(frozen=True)
class SgdEntry:
    """A step of SGD with momentum and decay of all parameters of a variant with 1,000 classes.

    bf16: weights in halves, and gradients in bf16.  fp32: whole weights and gradients, and LARS's factors.
    prefix: only parameters whose names begin so.
    """

    dtype: str
    variant: str = "paper"
    layer: str = "parameters"
    operation: str = "sgd"
    direction: str = "step"
    layout: str = "channels_last"
    prefix: str = ""
    batch: int = 1
    side: int = 1

    @property
    def name(self):
        return "/".join((self.variant, self.layer, self.operation, self.direction, self.dtype, self.layout))

    @property
    def shapes(self):
        found = parameter_shapes(VARIANTS[self.variant], 1000)
        return [shape for name, shape in found.items() if name.startswith(self.prefix)]

    @property
    def image_elements(self):
        """Parameters."""
        return sum(shape.numel() for shape in self.shapes)

    flops = 0

    def call(self, batch=None, device="meta"):
        def tensors(dtype):
            return [torch.zeros(shape, dtype=dtype, device=device) for shape in self.shapes]

        split = self.dtype == "bf16"
        sgd.sgd_(
            tensors(DTYPES[self.dtype]),
            tensors(DTYPES[self.dtype]),
            tensors(torch.float32),
            tensors(torch.int16) if split else None,
            lr=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            factors=None if split else torch.ones(len(self.shapes), device=device),
        )


@dataclass(frozen=True)
class LpipsEntry:
    """One call of a launcher of `lpips`: two maps of one trunk and their distance, or two batches of images.

    variant: "lpips-" and the trunk.  pool: (kernel size, stride) of the max-pool above the map, None without one.
    above: whether a gradient comes from there.
    """

    variant: str
    layer: str
    direction: str
    channels: int
    side: int
    pool: tuple | None = None
    above: bool = True
    dtype: str = "fp16"
    operation: str = "lpips"
    layout: str = "channels_last"
    batch: int = 16

    @property
    def name(self):
        return "/".join((self.variant, self.layer, self.operation, self.direction, self.dtype, self.layout))

    @property
    def image_elements(self):
        """Elements per image of one map."""
        return self.channels * self.side**2

    flops = 0

    def tensor(self, batch, side, device, dtype):
        x = torch.zeros(batch, self.channels, side, side, dtype=dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    def call(self, batch=None, device="meta"):
        batch, dtype = batch or self.batch, DTYPES[self.dtype]
        x = self.tensor(batch, self.side, device, dtype)
        if self.layer == "images":
            images = torch.zeros(batch, 3, self.side, self.side, device=device)
            shift, scale = torch.zeros(3, device=device), torch.ones(3, device=device)
            if self.direction == "forward":
                lpips.lpips_images(images, shift, scale, True, x)
            else:
                lpips.lpips_images_bwd(x, scale, True, images)
            return
        y, weight = torch.zeros_like(x), torch.zeros(self.channels, device=device)
        if self.direction == "forward":
            lpips.lpips_fwd([(x, y, weight)], [x.shape])
            return
        above = codes = None
        if self.pool is not None:
            kernel, stride = self.pool
            pooled = (self.side - kernel) // stride + 1
            above, codes = (self.tensor(batch, pooled, device, kind) for kind in (dtype, torch.int8))
        elif self.above:
            above = torch.zeros_like(x)
        grad = torch.zeros(batch, 1, device=device)
        lpips.lpips_bwd(
            grad, x, y, weight, above=above, codes=codes, window=self.pool or (1, 1), after_relu=True
        )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    kernel: Any  # JITFunction, or the interpreter's stand-in for it
    grid: tuple
    args: tuple
    constants: dict

    @property
    def name(self):
        return self.kernel.fn.__name__

    @property
    def programs(self):
        return self.grid[0]

    def argument(self, name):
        """The value of one argument of the kernel."""
        names = self.kernel.arg_names
        return self.constants[name] if name in self.constants else self.args[names.index(name)]


@contextlib.contextmanager
def recording():
    """Launches within the block are appended to the list that it gets, and do not run.  Also in the interpreter."""
    launches = []

    def record(kernel, grid):
        return lambda *args, **constants: launches.append(Launch(kernel, grid, args, constants))

    original = KernelInterface.__getitem__
    KernelInterface.__getitem__ = record
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = original


def launches(entry, batch=None):
    """What a call launches at this batch size, by default the entry's own."""
    with recording() as found:
        entry.call(batch)
    return found


def stage(variant, layer, channels, side, *, norm=(), pool=False, relu_first=True, pool_first=False):
    """The entries of one convolution and of what follows it."""
    plain = Entry(variant, layer, "", "", channels, side)
    pooling = replace(plain, operation="max_pool", fused=relu_first)
    out = []
    if relu_first or not pool:
        out.append(replace(plain, operation="bias_relu", direction="forward"))
        if not pool:
            out.append(replace(plain, operation="relu_bias_grad", direction="backward"))
    if norm and not pool_first:
        pooling = replace(pooling, operation="lrn_max_pool", norm=norm)
    if pool:
        out += [replace(pooling, direction=direction) for direction in ("forward", "inference", "backward")]
    if norm and pool_first:
        alone = replace(plain, operation="lrn", norm=norm, side=windows(side, 3, 2))
        out += [replace(alone, direction=direction) for direction in ("forward", "backward")]
    return out


def images(variant):
    """The entries of conv1's input, as blocks of 4x4 pixels: for the convolution, and again for its weight gradient."""
    with torch.device("meta"):
        padding = AlexNet(variant=replace(variant, init="torch")).block_padding(variant.crop, variant.crop)
    plain = Entry(variant.name, "conv1", "space_to_depth", "forward", 3, variant.crop, padding=padding)
    return [plain, replace(plain, direction="backward")]


def hidden(variant, layer, features, dropout):
    """The entries of one hidden linear layer; without dropout they are those of inference, too."""
    plain = Entry(variant, layer, "bias_relu", "forward", features, 1)
    out = [
        replace(plain, dropout=dropout),
        replace(plain, operation="relu_bias_grad", direction="backward", dropout=dropout),
    ]
    if dropout:
        out.append(replace(plain, direction="inference"))
    return out


def convolutions(variant):
    """The variant's convolutions; of a launcher whose algorithm is still to be chosen."""
    side, channels = variant.crop + variant.pad_end, variant.in_channels
    for number, conv in enumerate(variant.convs, 1):
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
        yield ConvEntry(variant.name, f"conv{number}", channels, side, conv.channels, *geometry)
        side, channels = windows(side, conv.kernel_size, conv.stride, conv.padding), conv.channels
        if conv.pool:
            side = windows(side, conv.pool, conv.pool_stride)


def entries_of(variant):
    """The entries of a variant but its convolutions.  Its dropout is 0.5."""
    relu_first = variant.relu == "first"
    # a convolution without a ReLU behind it is the library's, on images as they are
    out = images(variant) if relu_first else []
    for conv, call in zip(variant.convs, convolutions(variant), strict=True):
        wiring = {"pool": bool(conv.pool), "relu_first": relu_first, "pool_first": variant.pool_first}
        out += stage(variant.name, call.layer, conv.channels, call.out_side, norm=tuple(conv.lrn or ()), **wiring)
    dropouts = (0.5, 0.0 if variant.dropout_first else 0.5)
    for layer, features, dropout in zip(("fc6", "fc7"), variant.hidden, dropouts, strict=True):
        out += hidden(variant.name, layer, features, dropout)
    return out


MODEL_ENTRIES = [entry for variant in VARIANTS.values() for entry in entries_of(variant)]
ENTRIES = {
    entry.name: entry
    for base in MODEL_ENTRIES
    for dtype in DTYPES
    # features have one layout, blocks of pixels are channels_last whatever the image was, and so is LRN with pooling
    for layout in (
        LAYOUTS if base.side > 1 and base.operation not in ("space_to_depth", "lrn_max_pool") else ["channels_last"]
    )
    for entry in [replace(base, dtype=dtype, layout=layout)]
}

# conv1 also as a 3x3 convolution of what space-to-depth makes of the images: 48 channels, without padding
CONV_LAYERS = [
    layer
    for name in ("paper", "torchvision")
    for conv in convolutions(VARIANTS[name])
    for layer in (
        [conv, ConvEntry(name, "conv1_space_to_depth", 48, 57, conv.features, 3, 1, 0, 1)]
        if conv.layer == "conv1"
        else [conv]
    )
]
ENTRIES |= {
    entry.name: entry
    for base in CONV_LAYERS
    for algorithm in forward.ALGORITHMS
    # descriptors start at multiples of 16 bytes, which three channels do not
    if algorithm != "descriptors" or base.channels > 3
    for dtype, precision in [("fp16", "ieee"), ("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]
    for entry in [replace(base, algorithm=algorithm, dtype=dtype, precision=precision)]
}

# fp32 products with descriptors are refused: they spill
ENTRIES |= {
    entry.name: entry
    for base in CONV_LAYERS
    if base.channels > 3
    for algorithm in ("input_grad", "input_grad_descriptors", "weight_grad", "weight_grad_descriptors")
    # nobody needs the gradient of the images
    if not (base.layer == "conv1_space_to_depth" and algorithm.startswith("input_grad"))
    for dtype, precision in [("fp16", "ieee"), ("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]
    if not (algorithm.endswith("descriptors") and (dtype, precision) == ("fp32", "ieee"))
    for entry in [ConvGradEntry(**base.shape, algorithm=algorithm, dtype=dtype, precision=precision)]
}

ENTRIES |= {
    entry.name: entry
    for block in (1, 4)
    for resident in (False, True)
    for dtype in DTYPES
    for entry in [AugmentEntry(block, resident, dtype)]
}
ENTRIES |= {entry.name: entry for dtype in DTYPES for entry in [AugmentEntry(1, True, dtype, direction="inference")]}

ENTRIES |= {entry.name: entry for dtype in ("bf16", "fp32") for entry in [SgdEntry(dtype)]}

# Pictures of 256 x 256.
LPIPS_LAYERS = [
    LpipsEntry("lpips-alex", "images", "", 3, 256),
    LpipsEntry("lpips-alex", "relu1", "", 64, 63, pool=(3, 2)),
    LpipsEntry("lpips-alex", "relu2", "", 192, 31, pool=(3, 2)),
    LpipsEntry("lpips-alex", "relu3", "", 384, 15),
    LpipsEntry("lpips-alex", "relu4", "", 256, 15),
    LpipsEntry("lpips-alex", "relu5", "", 256, 15, above=False),
    LpipsEntry("lpips-vgg", "relu1_2", "", 64, 256, pool=(2, 2)),
    LpipsEntry("lpips-vgg", "relu2_2", "", 128, 128, pool=(2, 2)),
    LpipsEntry("lpips-vgg", "relu3_3", "", 256, 64, pool=(2, 2)),
    LpipsEntry("lpips-vgg", "relu4_3", "", 512, 32, pool=(2, 2)),
    LpipsEntry("lpips-vgg", "relu5_3", "", 512, 16, above=False),
]
ENTRIES |= {
    entry.name: entry
    for base in LPIPS_LAYERS
    for direction in ("forward", "backward")
    for dtype in DTYPES
    for entry in [replace(base, direction=direction, dtype=dtype)]
}


def representative(dtype):
    """The entries that differ, of training in channels_last: the paper's, caffenet's for the LRN alone, and LPIPS."""
    augmented = ("pictures", "pictures_space_to_depth", "resident", "resident_space_to_depth")
    layers = (*augmented, "conv1", "conv2", "conv3", "conv5", "fc6", "parameters")
    wanted = [("paper", layer) for layer in layers]
    wanted += [("lpips-alex", layer) for layer in ("images", "relu1", "relu2", "relu3", "relu4")]
    wanted += [("lpips-vgg", "relu4_3")]
    return [
        entry
        for entry in ENTRIES.values()
        if (entry.dtype, entry.layout) == (dtype, "channels_last")
        and not isinstance(entry, ConvEntry)
        and entry.direction != "inference"
        and ((entry.variant, entry.layer) in wanted or (entry.variant, entry.operation) == ("caffenet", "lrn"))
    ]

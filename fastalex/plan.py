"""What a training run would need and how long it would take, on GPUs that need not be there: a model, no measurement.

A pass takes as long as its matrix products at the chip's published rate, or as its bytes at the published rate of its
memory, whichever is longer; kernels follow each other without a gap, and each reads its input and writes its output
once.  That is a floor: `Plan.slower` says how far above it a step was that was measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fastalex.describe import Layer, describe
from fastalex.inspection.chips import Chip, find_chip, times
from fastalex.training.recipes import RECIPES, Recipe
from fastalex.variants import VARIANTS, BatchNorm, Conv, Variant

IMAGENET = 1_281_167  # training pictures of ILSVRC-2012
VALIDATION = 50_000  # its pictures for testing, which each epoch ends with
RECORD = 256 * 256 * 3  # bytes of a picture as `fastalex pack` writes it
DISK = 7.0  # GB/s: one NVMe drive with four lanes of PCI Express 4, data sheets
MACHINE = 8  # GPUs in a machine
NETWORK = 50.0  # GB/s from each GPU to other machines: 400 Gbit/s, data sheet

# DRAM bytes that an update moves for each parameter, counted from the tensors that it reads and writes.
# The bf16 copy of a weight is 4 read and 2 written, bf16 gradients to fp32 2 and 4; SGD, fused, reads weight, gradient
# and momentum and writes the first and the last; LARS takes the norms of weight and gradient before that.
CAST, SGD_UPDATE, LARS_UPDATE = 12, 20, 8 + 20

# The step of an H100 that was measured, replayed from a CUDA graph and called without one (benchmarks/results,
# 2026-11-26): the paper's network in bf16, 128 pictures that are ready, SGD.
MEASURED_CHIP, MEASURED, MEASURED_LOOP = "H100", 2.84e-3, 12.6e-3


@dataclass(frozen=True)
class Stage:
    """One part of a step on one GPU.  seconds: modelled.  bound: what sets them."""

    name: str
    seconds: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found.  Sizes in bytes and per GPU, times in seconds; everything is modelled.

    memory: what each GPU holds beside the set.  share: of the set, for each GPU.  capacity: of a GPU.
    stages: the parts of a training step, one after the other.  beside: what goes on at the same time: the exchange of
    gradients during the backward pass, pictures on their way from the machine's memory if the GPUs cannot hold them,
    and the host's calls without a CUDA graph.  step: all of it.  load: reading the set, once.  epoch: with the pictures
    for testing.  total: load and all epochs.  bound: what would have to be faster for the step to be shorter.
    slower: how many times its model the measured step of this chip took; None for another chip.
    total_if_slower: `total` if everything that a GPU computes takes so many times its model.
    """

    recipe: str
    variant: str
    chip: str
    gpus: int
    batch_size: int
    epochs: int
    pictures: int
    dtype: str
    memory: dict[str, int]
    share: int
    capacity: int
    stages: tuple[Stage, ...]
    beside: tuple[Stage, ...]
    step: float
    load: Stage
    epoch: float
    total: float
    bound: str
    slower: float | None
    total_if_slower: float | None

    @property
    def used(self) -> int:
        """Bytes of a GPU, without the set."""
        return sum(self.memory.values())

    @property
    def is_resident(self) -> bool:
        """Whether a GPU's share of the set fits beside the rest."""
        return self.used + self.share <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        own = self.batch_size / self.gpus
        return {
            "modelled": True,
            **asdict(self),
            "is_resident": self.is_resident,
            "pictures_per_second": self.batch_size / self.step,
            "pictures_per_second_and_gpu": {s.name: own / s.seconds for s in (*self.stages, *self.beside)},
        }


def plan(
    recipe: str = "fast",
    *,
    gpus: int = 8,
    chip: str = "H100",
    variant: str | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    pictures: int = IMAGENET,
    classes: int = 1000,
) -> Plan:
    """The plan of a data-parallel run on pictures of 256x256, which lie on the GPUs if they fit.

    Raises ValueError, naming the argument, for a recipe, variant or chip that is unknown, or a number out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    where = find_chip(chip)
    for name, value in (("gpus", gpus), ("set_size", pictures)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    changes: dict[str, Any] = {"variant": VARIANTS.get(variant or ""), "batch_size": batch_size, "epochs": epochs}
    chosen = replace(RECIPES[recipe], **{name: value for name, value in changes.items() if value is not None})
    if chosen.batch_size % gpus:
        raise ValueError(f"batch_size must be a multiple of gpus, {gpus}, got {chosen.batch_size}")
    steps = chosen.steps_per_epoch(pictures)
    return _planned(recipe, chosen, where, gpus, pictures, steps, classes)


def _planned(name: str, recipe: Recipe, chip: Chip, gpus: int, pictures: int, steps: int, classes: int) -> Plan:
    own, half = recipe.batch_size // gpus, recipe.amp != "off"
    layers = describe(recipe.variant, classes).stages()
    parameters = sum(layer.parameters for stage in layers.values() for layer in stage)
    memory = _memory(recipe, layers, parameters, own)
    share, capacity = -(-pictures // gpus) * RECORD, int(chip.memory * 1e9)
    resident = sum(memory.values()) + share <= capacity
    stages = _stages(recipe, layers, parameters, own, chip)
    parts = {part: sum(s.seconds for s in stages if s.name.startswith(part)) for part in ("forward", "backward", "")}

    beside = []
    if gpus > 1:
        # a ring: each process sends 2 (n - 1) / n of its gradients, in fp32
        sent = 2 * (gpus - 1) / gpus * 4 * parameters
        speed, wire = (NETWORK, "network") if gpus > MACHINE else (chip.link, "link")
        beside.append(Stage("exchange of gradients, during backward", sent / (speed * 1e9), wire))
    if not resident:
        beside.append(Stage("pictures to the GPU", own * RECORD / (chip.host * 1e9), "PCI Express"))
    if not recipe.cuda_graphs:
        beside.append(Stage("calls of the host, measured at 128 pictures", MEASURED_LOOP, "host"))

    def step_at(pace: float) -> tuple[float, str]:
        """Seconds of a step whose kernels take so many times their model, and what bounds it."""
        device, backward = pace * parts[""], pace * parts["backward"]
        bounds: dict[str, float] = {}
        for s in stages:
            bounds[s.bound] = bounds.get(s.bound, 0.0) + s.seconds
        longest = (device, max(bounds, key=bounds.__getitem__))
        for s in beside:
            exchanged = s.name.startswith("exchange")
            needed = device + s.seconds - backward if exchanged else s.seconds
            longest = max(longest, (needed, s.bound))
        return longest

    of_a_machine = pictures * RECORD / -(-gpus // MACHINE)
    disk, wire_seconds = of_a_machine / (DISK * 1e9), share / (chip.host * 1e9) if resident else 0.0
    load = Stage("load", max(disk, wire_seconds), "disk" if disk >= wire_seconds else "PCI Express")

    def epoch_at(pace: float) -> float:
        return steps * step_at(pace)[0] + pace * VALIDATION / gpus / own * parts["forward"]

    slower = MEASURED / modelled_as_measured(chip) if chip.name == MEASURED_CHIP else None
    step, bound = step_at(1.0)
    return Plan(
        recipe=name,
        variant=recipe.variant.name,
        chip=chip.name,
        gpus=gpus,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        pictures=pictures,
        dtype=recipe.amp if half else "tf32",
        memory=memory,
        share=share,
        capacity=capacity,
        stages=stages,
        beside=tuple(beside),
        step=step,
        load=load,
        epoch=epoch_at(1.0),
        total=load.seconds + recipe.epochs * epoch_at(1.0),
        bound=bound,
        slower=slower,
        total_if_slower=None if slower is None else load.seconds + recipe.epochs * epoch_at(slower),
    )


def _stages(
    recipe: Recipe, layers: dict[str, tuple[Layer, ...]], parameters: int, count: int, chip: Chip
) -> tuple[Stage, ...]:
    """The parts of a step of so many pictures on one GPU.  Without automatic mixed precision products are in TF32."""
    half = recipe.amp != "off"
    size, dtype = (2, "fp16") if half else (4, "tf32")

    def stage(label: str, *kernels: Kernel) -> Stage:
        bounds: dict[str, float] = {}
        for flops, moved in kernels:
            busy = times(chip, pipes={}, dram_bytes=moved, flops=flops, dtype=dtype)
            bound = max(busy, key=busy.__getitem__)
            bounds[bound] = bounds.get(bound, 0.0) + busy[bound]
        return Stage(label, sum(bounds.values()), max(bounds, key=bounds.__getitem__))

    variant = recipe.variant
    kernels = _kernels(variant, layers, count, size)
    update = (SGD_UPDATE if recipe.trust is None else LARS_UPDATE) + (CAST if half else 0)
    return (
        # the window of the crop in each record, and the crop
        stage("augment", (0.0, count * variant.in_channels * variant.crop**2 * (1 + size))),
        *(stage(f"forward {label}", *kernels[label][0]) for label in kernels),
        *(stage(f"backward {label}", *kernels[label][1]) for label in reversed(kernels)),
        stage("update", (0.0, parameters * update)),
    )


def modelled_as_measured(chip: Chip) -> float:
    """Seconds of the step behind `MEASURED` by the model."""
    recipe = replace(RECIPES["paper"], amp="bf16")
    layers = describe(recipe.variant).stages()
    parameters = sum(layer.parameters for stage in layers.values() for layer in stage)
    stages = _stages(recipe, layers, parameters, recipe.batch_size, chip)
    return sum(stage.seconds for stage in stages if stage.name != "augment")


Kernel = tuple[float, float]  # FLOP of its matrix product, and the bytes that it moves


def _kernels(
    variant: Variant, layers: dict[str, tuple[Layer, ...]], count: int, size: int
) -> dict[str, tuple[list[Kernel], list[Kernel]]]:
    """{name: (kernels of the forward pass, of the backward pass)} of each convolution with what follows it, and of each
    linear layer.

    count: pictures.  size: bytes of an element.  Every tensor that a kernel reads or writes counts once.
    """
    found = {}
    inputs = variant.in_channels * variant.crop**2
    convs = {f"conv{number}": conv for number, conv in enumerate(variant.convs, 1)}
    for name, stage in layers.items():
        first, outputs = stage[0], _elements(stage[-1])
        read, made, left = (count * size * n for n in (inputs, first.neurons, outputs))
        product: Kernel = (count * first.flops, read + size * first.parameters + made)
        forward, backward = [product], [product] * 2  # the gradients of the weight and of the input
        if name == "conv1":  # nobody needs the gradient of the pictures
            backward = [product]
        if name in convs:
            after = _after(convs[name], variant, made, left, size)
            forward, backward = forward + [(0.0, after[0])], [(0.0, after[1])] + backward
        found[name] = (forward, backward)
        inputs = outputs
    return found


def _after(conv: Conv, variant: Variant, made: int, left: int, size: int) -> tuple[float, float]:
    """DRAM bytes, forward and backward, of what stands behind a convolution.

    made: bytes of its output.  left: of what leaves the stage.
    """
    codes = left / size  # a byte for each window
    alone = variant.pool_first or not conv.pool  # the normalisation has kernels of its own
    if conv.pool:
        forward, backward = made + left + codes, left + codes + made
        if conv.lrn and not alone:  # backward needs its input
            backward += made
    else:
        forward, backward = 0.0, 3.0 * made  # the ReLU's: gradient and output to gradient
    if isinstance(conv.norm, BatchNorm):
        # statistics, then the normalisation; backward two sums, then the gradient
        normed = left if alone else made
        forward, backward = forward + 3.0 * normed, backward + 5.0 * normed
    elif conv.lrn and alone:
        forward, backward = forward + 2.0 * left, backward + 3.0 * left
    return forward, backward


def _elements(layer: Layer) -> int:
    count = 1
    for n in layer.shape:
        count *= n
    return count


def _memory(recipe: Recipe, layers: dict[str, tuple[Layer, ...]], parameters: int, count: int) -> dict[str, int]:
    """Bytes on one GPU, but for the set.  What is kept for the backward pass: as `describe` measures it in fp32, half
    of that in 16 bits but for the pooling's codes, which are bytes."""
    half = recipe.amp != "off"
    kept = 0
    for stage in layers.values():
        codes = sum(_elements(layer) for layer in stage if layer.name.startswith("pool"))
        measured = sum(layer.fused_bytes or 0 for layer in stage)
        kept += (measured - codes) // 2 + codes if half else measured
    size, largest = 2 if half else 4, max(stage[0].neurons for stage in layers.values())
    return {
        "weights": 4 * parameters,
        **({"weights in 16 bits": 2 * parameters} if half else {}),
        "gradients": 4 * parameters,
        "momentum": 4 * parameters,
        "pictures of a step": count * recipe.variant.in_channels * recipe.variant.crop**2 * size,
        "kept for backward": count * kept,
        "largest layer's output and its gradient": 2 * count * largest * size,
    }


def report(found: Plan) -> str:
    """The plan as Markdown."""
    own = found.batch_size // found.gpus
    machines = "" if found.gpus <= MACHINE else f" in {-(-found.gpus // MACHINE)} machines"
    together = found.used + (found.share if found.is_resident else 0)
    share = "its share of the set" if found.is_resident else "its share of the set: does not fit, stays outside"
    lines = [
        f"Recipe {found.recipe}, variant {found.variant}, {found.pictures:,} pictures, {found.batch_size:,} a step, "
        f"{found.dtype}, {found.gpus:,} x {found.chip}{machines}. Modelled, from data sheets.",
        "",
        "| a GPU holds | GB |",
        "|---|---:|",
        f"| {share} | {found.share / 1e9:.2f} |",
        *(f"| {name} | {size / 1e9:.2f} |" for name, size in found.memory.items()),
        f"| together, of {found.capacity / 1e9:.0f} | {together / 1e9:.2f} |",
        "",
        f"| a step, {own:,} pictures a GPU | ms | pictures a second and GPU | bound by |",
        "|---|---:|---:|---|",
        *(_row(stage, own) for stage in found.stages),
        *(_row(replace(stage, name=f"beside: {stage.name}"), own) for stage in found.beside),
        _row(Stage("together", found.step, found.bound), own),
        "",
        "| the run | |",
        "|---|---:|",
        f"| load the set, once, bound by {found.load.bound} | {_time(found.load.seconds)} |",
        f"| pictures a second, all GPUs | {found.batch_size / found.step:,.0f} |",
        f"| an epoch, and {VALIDATION:,} pictures for testing | {_time(found.epoch)} |",
        f"| {found.epochs} epochs and the load | {_time(found.total)} |",
    ]
    if found.slower is not None and found.total_if_slower is not None:
        lines.append(f"| if kernels take {found.slower:.2f} times their model | {_time(found.total_if_slower)} |")
        lines += [
            "",
            f"{found.slower:.2f}: the step that was measured on an {found.chip} (paper, bf16, 128 pictures, "
            f"{1e3 * MEASURED:.2f} ms) over its model.",
        ]
    return "\n".join(lines) + "\n"


def _row(stage: Stage, count: int) -> str:
    return f"| {stage.name} | {1e3 * stage.seconds:.3f} | {count / stage.seconds:,.0f} | {stage.bound} |"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""What a training run would need and how long it would take, on GPUs that need not be there: a model, no measurement.

A pass takes as long as its matrix products at the chip's published rate, or as its bytes at the published rate of its
memory, whichever is longer; kernels follow each other without a gap, and each reads its input and writes its output
once.  That is a floor.  Where a step was measured, `MEASURED` says how far above the floor it was.
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
# and momentum and writes the first and the last; LARS takes two norms, adds the decay, scales, and updates unfused.
CAST, SGD_UPDATE, LARS_UPDATE = 12, 20, 8 + 12 + 8 + 32

# Seconds of a training step that a GPU took, replayed from a CUDA graph: docs/gpu.md, benchmarks/results.
MEASURED = {("H100", "paper", "bf16", 128): 2.84e-3}
# Seconds of the same step without a graph, in which the host's calls are the limit: the README's "loop" less its device.
HOST = 12.6e-3


@dataclass(frozen=True)
class Stage:
    """One part of a step on one GPU.  seconds: modelled.  bound: what sets them."""

    name: str
    seconds: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found.  Sizes in bytes and per GPU, times in seconds; everything is modelled.

    memory: what each GPU holds.  capacity: of a GPU.  stages: the parts of a training step, one after the other.
    exchange: sending and receiving the gradients, beside the backward pass.  step: all of it.  load: reading the set
    into the GPUs, once.  epoch: with the pictures for testing.  total: load and all epochs.
    bound: what the step would have to do less of, to be shorter.
    measured_over_model: of the measured step that is nearest, or None.
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
    capacity: int
    stages: tuple[Stage, ...]
    exchange: Stage | None
    host: float | None
    step: float
    load: Stage
    epoch: float
    total: float
    bound: str
    measured_over_model: float | None

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.capacity

    def part(self, name: str) -> float:
        """Seconds of the stages whose name starts so."""
        return sum(stage.seconds for stage in self.stages if stage.name.startswith(name))

    def to_dict(self) -> dict[str, Any]:
        per_gpu = self.batch_size / self.gpus
        return {
            "modelled": True,
            **asdict(self),
            "fits": self.fits,
            "pictures_per_second": self.batch_size / self.step,
            "pictures_per_second_and_gpu": {stage.name: per_gpu / stage.seconds for stage in self.stages},
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
    """The plan of a data-parallel run with pictures of 256x256 that lie on the GPUs.

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
    changes = {"variant": VARIANTS[variant] if variant else None, "batch_size": batch_size, "epochs": epochs}
    chosen = replace(RECIPES[recipe], **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if chosen.batch_size % gpus:
        raise ValueError(f"batch_size must be a multiple of gpus, {gpus}, got {chosen.batch_size}")
    steps = chosen.steps_per_epoch(pictures)
    return _planned(recipe, chosen, where, gpus, pictures, steps, classes)


def _planned(name: str, recipe: Recipe, chip: Chip, gpus: int, pictures: int, steps: int, classes: int) -> Plan:
    variant, own = recipe.variant, recipe.batch_size // gpus
    dtype = {"off": "tf32", "bf16": "bf16", "fp16": "fp16"}[recipe.amp]
    layers = describe(variant, classes).stages()
    parameters = sum(layer.parameters for stage in layers.values() for layer in stage)
    size = 4 if recipe.amp == "off" else 2
    update = (SGD_UPDATE if recipe.trust is None else LARS_UPDATE) + (0 if recipe.amp == "off" else CAST)

    def stage(label: str, *kernels: Kernel) -> Stage:
        by_bound: dict[str, float] = {}
        for flops, moved in kernels:
            busy = times(chip, pipes={}, dram_bytes=moved, flops=flops, dtype=dtype)
            bound = max(busy, key=busy.__getitem__)
            by_bound[bound] = by_bound.get(bound, 0.0) + busy[bound]
        return Stage(label, sum(by_bound.values()), max(by_bound, key=by_bound.__getitem__))

    kernels = _kernels(variant, layers, own, size)
    stages = [
        # the window of the crop in each record, and the crop
        stage("augment", (0.0, own * variant.in_channels * variant.crop**2 * (1 + size))),
        *(stage(f"forward {label}", *kernels[label][0]) for label in kernels),
        *(stage(f"backward {label}", *kernels[label][1]) for label in reversed(kernels)),
        stage("update", (0.0, parameters * update)),
    ]
    device = sum(s.seconds for s in stages)
    backward = sum(s.seconds for s in stages if s.name.startswith("backward"))
    # each process sends 2 (n - 1) / n of its gradients, in fp32 (ring all-reduce)
    across = gpus > MACHINE
    speed = NETWORK if across else chip.link
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    exchange = Stage("exchange", sent / (speed * 1e9), "network" if across else "link") if gpus > 1 else None
    # DistributedDataParallel sends while the backward pass goes on
    waiting = max(0.0, exchange.seconds - backward) if exchange else 0.0
    host = None if recipe.cuda_graphs else HOST
    step = max(device + waiting, host or 0.0)
    by_bound: dict[str, float] = {}
    for s in stages:
        by_bound[s.bound] = by_bound.get(s.bound, 0.0) + s.seconds
    bound = max(by_bound, key=by_bound.__getitem__)
    if exchange and exchange.seconds > backward:
        bound = exchange.bound
    if host and host > device + waiting:
        bound = "host"
    share = -(-pictures // gpus) * RECORD
    machines = -(-gpus // MACHINE)
    of_a_machine = pictures * RECORD / machines
    disk, wire = of_a_machine / (DISK * 1e9), share / (chip.host * 1e9)
    load = Stage("load", max(disk, wire), "disk" if disk >= wire else "PCI Express")
    forward = sum(s.seconds for s in stages if s.name.startswith("forward"))
    epoch = steps * step + VALIDATION / gpus / own * forward
    reference = MEASURED.get((chip.name, "paper", dtype, 128))
    return Plan(
        recipe=name,
        variant=variant.name,
        chip=chip.name,
        gpus=gpus,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        pictures=pictures,
        dtype=dtype,
        memory={"set": share, **_memory(variant, layers, parameters, own, recipe)},
        capacity=int(chip.memory * 1e9),
        stages=tuple(stages),
        exchange=exchange,
        host=host,
        step=step,
        load=load,
        epoch=epoch,
        total=load.seconds + recipe.epochs * epoch,
        bound=bound,
        measured_over_model=None if reference is None else reference / modelled_as_measured(chip),
    )


def modelled_as_measured(chip: Chip) -> float:
    """Seconds of the step in `MEASURED` by the model: the paper's network in bf16, 128 pictures on one GPU, SGD, and
    pictures that are ready."""
    recipe = replace(RECIPES["paper"], amp="bf16", drop_last=True, cuda_graphs=True)
    # without the chip's name, or it would ask for itself
    found = _planned("paper", recipe, replace(chip, name=""), 1, IMAGENET, 1, 1000)
    return found.step - found.part("augment")


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
        product = (float(count * first.flops), read + size * first.parameters + made)
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


def _memory(
    variant: Variant, layers: dict[str, tuple[Layer, ...]], parameters: int, count: int, recipe: Recipe
) -> dict[str, int]:
    """Bytes on one GPU.  Activations: what autograd keeps, as `describe` measures it in fp32; codes are bytes."""
    half = recipe.amp != "off"
    kept = largest = 0
    for stage in layers.values():
        codes = sum(_elements(layer) for layer in stage if layer.name.startswith("pool"))
        bytes_kept = sum(layer.fused_bytes or 0 for layer in stage)
        kept += (bytes_kept - codes) // 2 + codes if half else bytes_kept
        largest = max(largest, stage[0].neurons)
    size = 2 if half else 4
    return {
        "weights": 4 * parameters,
        "weights in 16 bits": 2 * parameters if half else 0,
        "gradients": 4 * parameters,
        "momentum": 4 * parameters,
        "pictures of a step": count * variant.in_channels * variant.crop**2 * size,
        "kept for backward": count * kept,
        # of the largest layer, its output and the gradient for it exist for a moment
        "at work": 2 * count * largest * size,
    }


def report(found: Plan) -> str:
    """The plan as Markdown."""
    own = found.batch_size // found.gpus
    machines = "" if found.gpus <= MACHINE else f" in {-(-found.gpus // MACHINE)} machines"
    gb = 1e9
    memory = sum(found.memory.values())
    lines = [
        f"Recipe {found.recipe}, variant {found.variant}, {found.pictures:,} pictures, {found.batch_size:,} a step, "
        f"{found.dtype}; {found.gpus:,} x {found.chip}{machines}. Everything is modelled, from data sheets.",
        "",
        "| memory of a GPU | GB |",
        "|---|---:|",
        *(f"| {name} | {bytes_ / gb:.2f} |" for name, bytes_ in found.memory.items()),
        f"| together, of {found.capacity / gb:.0f}: {'fits' if found.fits else 'does not fit'} | {memory / gb:.2f} |",
        "",
        f"| a step, {own:,} pictures a GPU | ms | pictures a second and GPU | bound by |",
        "|---|---:|---:|---|",
        *(_row(stage, own) for stage in found.stages),
    ]
    if found.exchange:
        lines.append(_row(replace(found.exchange, name="exchange of gradients, beside the backward pass"), own))
    if found.host:
        lines.append(_row(Stage("the host's calls, without a CUDA graph (measured at 128)", found.host, "host"), own))
    lines += [
        _row(Stage("together", found.step, found.bound), own),
        "",
        "| the run | |",
        "|---|---:|",
        f"| load the set, once; bound by {found.load.bound} | {_time(found.load.seconds)} |",
        f"| pictures a second, all GPUs | {found.batch_size / found.step:,.0f} |",
        f"| an epoch, with {VALIDATION:,} pictures for testing | {_time(found.epoch)} |",
        f"| {found.epochs} epochs and the load | {_time(found.total)} |",
    ]
    if found.measured_over_model is not None:
        ratio = found.measured_over_model
        rest = found.load.seconds + ratio * (found.total - found.load.seconds)
        lines.append(f"| the same, if every step takes {ratio:.2f} times its model | {_time(rest)} |")
        lines += [
            "",
            f"The one step that was measured on this chip (paper, bf16, 128 pictures, one GPU) took {ratio:.2f} times "
            "its model.",
        ]
    return "\n".join(lines) + "\n"


def _row(stage: Stage, count: int) -> str:
    return f"| {stage.name} | {1e3 * stage.seconds:.3f} | {count / stage.seconds:,.0f} | {stage.bound} |"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

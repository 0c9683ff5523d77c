"""The command line: `fastalex demo | pack | verify | train | eval | predict | visualize | experiment | ...`.

`python -m fastalex` is the same program.

One thin function per subcommand; what it needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect as introspection
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_type_hints

from fastalex.checkpoint import DEMO_MODEL

# import name -> why it can be missing: the `cli` extra installs all of them
EXTRAS = ("PIL", "matplotlib", "rich", "safetensors", "torchvision", "tyro")
VISUALIZED = Path("runs/visualize")
DESCRIPTION = """AlexNet as fast as the hardware allows: train it, measure it, let it name pictures.

Without a command: --version, and --tyro-write-completion SHELL FILE for completion in bash, zsh or fish.
"""
# What an argument's value is called in --help, where its name is not the word and its type is no list of choices.
WORDS = {
    **dict.fromkeys(("data", "keep", "out"), "FOLDER"),
    **dict.fromkeys(("chart", "compare", "index", "json", "map", "markdown", "readme", "results", "trunk"), "FILE"),
    **dict.fromkeys(("names", "val_labels"), "FILE"),
    **dict.fromkeys(("first", "second"), "PICTURE"),
    "images": "[PICTURE ...]",
    "kernel": "TEXT",
    "lr": "RATE",
    "backbone_lr": "FACTOR",
    "init": "WEIGHTS",
    **dict.fromkeys(("label_smoothing", "threshold"), "SHARE"),
    "save_minutes": "MINUTES",
}


def fail(message: object) -> NoReturn:
    """One line on stderr and exit code 2, as for a wrong argument."""
    print(f"fastalex: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


try:
    import tyro
except ModuleNotFoundError:
    tyro = None  # type: ignore[assignment]  # the commands are functions without it, too; `main` says what is missing


def demo(out: Path = DEMO_MODEL.parent, epochs: int = 24, device: str | None = None) -> None:
    """Train a small AlexNet on the pictures that ship with fastalex, and show what it learnt.

    Prints the five likeliest classes of held-out pictures and writes model.safetensors, metrics.jsonl,
    learning_curve.png, filters.png and predictions.png.  Training took 83 seconds on two cores of an AMD EPYC.

    Args:
        out: Folder for the results.
        epochs: Passes over the 5,000 training pictures.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.demo import run
    from fastalex.devices import find_device

    run(out, epochs, find_device(device))


def train(
    data: Path | None = None,
    recipe: Literal["photos", "fine-tune", "demo", "paper", "caffe", "torchvision", "fast"] | None = None,
    variant: Literal["demo", "paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet", "bn"] | None = None,
    init: str | None = None,
    freeze: Literal["nothing", "features", "backbone"] | None = None,
    backbone_lr: float | None = None,
    out: Path = Path("runs/train"),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    label_smoothing: float | None = None,
    amp: Literal["off", "bf16", "fp16"] | None = None,
    accumulate: int | None = None,
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    parallel: Literal["data", "hybrid"] | None = None,
    deterministic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: str | None = None,
    keep: Literal["auto", "on-device", "in-memory", "nothing"] | None = None,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] | None = None,
    seed: int | None = None,
    resume: bool = False,
    save_minutes: float | None = None,
    save_steps: int | None = None,
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a model; after every epoch a checkpoint and a line of metrics.jsonl are written to the output folder.

    Own pictures take a small network for 64x64 pictures and 24 to 100 epochs (recipe "photos", minutes on a CPU), or
    from 100,000 pictures of 100 classes on the network and the recipe of 2012 ("paper"); the choice is printed first.
    SIGTERM and Ctrl-C save the state and end the run. On several GPUs: torchrun --nproc-per-node 8 -m fastalex train
    ...

    Args:
        data: Folder with CLASS/*.jpg, of which a fifth is held out for testing; or with train/CLASS/*.jpg and
            val/CLASS/*.jpg; by default the Fashion-MNIST sample that ships with fastalex.
        recipe: How to train: "photos" (own pictures, few or many), "fine-tune" (on from --init), "paper" (2012),
            "caffe" (its bvlc_alexnet), "torchvision", "fast" (large batches for many GPUs), "demo" (the sample). By
            default as said above, "fine-tune" where --init is of full size, and for the sample "demo", or "paper" with
            another --variant.
        variant: Which AlexNet, by default the recipe's or that of --init: "demo" is narrow and takes 64x64 pictures,
            the others have the full size.
        init: Weights to start from instead of random ones: IMAGENET1K_V1, a file as for predict, or the folder of a
            run. The last layer is made anew where it is for other classes; pictures are prepared as for the weights.
        freeze: Keep the weights of --init in the convolutions ("features") or in all but the last layer ("backbone").
        backbone_lr: Learning rate of all layers but the last, relative to --lr: by default 1, and 0.1 in "fine-tune".
        out: Folder for model.safetensors (for eval and predict), state.pt and settings.json (for --resume) and
            metrics.jsonl.
        epochs: Passes over the training pictures.
        batch_size: Pictures per step, in all processes together.
        lr: Highest learning rate.
        label_smoothing: Share of the target that is spread over all classes.
        amp: Automatic mixed precision: bf16, or fp16 with loss scaling.
        accumulate: Cut each step's pictures into this many pieces, one after the other, to save memory; by default 1.
        compile: Pass the model through torch.compile.
        parallel: Of several processes: "data", the default, gives each the whole model, "hybrid" splits the fully
            connected layers.
        deterministic: Take only algorithms that give the same bits in every run, slower on a GPU.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
        keep: Where the pictures lie: "on-device" and "in-memory" load them once, "nothing" reads them in every epoch;
            "auto", the default, keeps the sample, and on a GPU a packed set that fits.
        workers: Processes that read pictures from --data, 0 for none; by default one per core, 8 at most.
        on_error: What a damaged picture in a folder does: "stop" ends with its path, "skip" reads every picture once
            before it starts, leaves out what cannot be read, and lists it; by default "stop".
        seed: Of the initial weights, the order of the pictures, the crops and the dropout; by default 0.
        resume: Go on with the run in the output folder, if there is one, with its own settings; other arguments change
            what may change (epochs, device, workers, save_minutes, ...), and are refused where they contradict it.
        save_minutes: How often state.pt is written within an epoch; by default every 10.
        save_steps: Write state.pt after this many steps, too.
        tensorboard: Write metrics for TensorBoard, too, into the output folder.
    """
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    del flags["out"], flags["resume"]
    from fastalex.training.launch import launch

    launch(flags, out, resume=resume)


def evaluate(
    weights: str = str(DEMO_MODEL),
    data: Path | None = None,
    crops: Literal["centre", "ten"] = "centre",
    out: Path | None = None,
    batch_size: int = 250,
    device: str | None = None,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> None:
    """Measure a model's accuracy on test pictures, as a whole and class by class.

    Args:
        weights: A model.safetensors that `fastalex train`, `fastalex demo` or `fastalex convert` wrote, by default the
            demo's; a .pth file of torchvision's; a .caffemodel or .onnx of Caffe's AlexNets; or IMAGENET1K_V1 for
            torchvision's published weights, which are downloaded once.
        data: Folder with val/CLASS/*.jpg (or test/CLASS/...); by default the Fashion-MNIST sample.
        crops: "centre", or "ten" crops a picture as in the 2012 paper: corners, centre, and their mirror images.
        out: Folder for scores.json (with every class and the confusion matrix) and confusion.png.
        batch_size: Images per step; of ten crops a tenth as many pictures.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
        workers: Processes that read pictures from --data, 0 for none; by default one per core, 8 at most.
        on_error: What a damaged picture in a folder does: "stop" ends with its path, "skip" reads every picture once
            before it starts, leaves out what cannot be read, and lists it.
    """
    from fastalex.evaluation import commands

    commands.evaluate(
        weights,
        data,
        crops=crops,
        out=out,
        batch_size=batch_size,
        device=device,
        workers=workers,
        on_error=on_error,
    )


def predict(
    images: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    weights: str = str(DEMO_MODEL),
    top: int = 5,
    ten_crop: bool = False,
    out: Annotated[Path, "FILE"] = Path("runs/predict/predictions.png"),
    json: Path | None = None,
    device: str | None = None,
) -> None:
    """Say what is on pictures: the likeliest classes with their probabilities, in the terminal and as a figure.

    A picture that cannot be read is named, and the others go on; the exit code is then 1, or 2 if none could be read.

    Args:
        images: Picture files (JPEG, PNG, ...), folders of them, addresses (https://...), or - for standard input; by
            default four pictures: of the Fashion-MNIST sample for the demo's model, else photos of scikit-image.
        weights: A model.safetensors that `fastalex train`, `fastalex demo` or `fastalex convert` wrote, by default the
            demo's; a .pth file of torchvision's; a .caffemodel or .onnx of Caffe's AlexNets; or IMAGENET1K_V1 for
            torchvision's published weights, which are downloaded once.
        top: How many classes to name.
        ten_crop: Average the probabilities of corners, centre and their mirror images, as the 2012 paper.
        out: File (PNG) for the first 24 pictures with their classes as bars.
        json: File for all pictures with their classes and probabilities, and for what could not be read.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.evaluation import commands

    commands.predict(images, weights, top=top, ten_crop=ten_crop, out=out, json_file=json, device=device)


def convert(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    names: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write weights from elsewhere as a model.safetensors that says its variant, its classes and its preprocessing.

    Args:
        source: Caffe's bvlc_alexnet.caffemodel or bvlc_reference_caffenet.caffemodel, an AlexNet of the ONNX zoo
            (bvlcalexnet-12.onnx), a .pth file, or IMAGENET1K_V1 for torchvision's published weights.
        target: The file to write, called .safetensors.
        names: Text file with the name of a class per line; by default ImageNet's 1,000.
        overwrite: Replace a file that is there.
    """
    from fastalex.evaluation import commands

    commands.convert(source, target, names=names, overwrite=overwrite)


def lpips(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    net: Literal["alex", "vgg", "squeeze"] = "alex",
    json: Path | None = None,
    map: Path | None = None,
    trunk: Path | None = None,
    device: str | None = None,
) -> None:
    """How different two pictures look to people: their LPIPS distance (Zhang et al. 2018), 0 for equal ones.

    Args:
        first: A picture, or a folder of pictures.
        second: A picture of the same size; or a folder with pictures of the same names, compared one by one.
        net: Whose features are compared: "alex" is the authors' choice for such a number.
        json: File for the distances and their mean.
        map: File (PNG) for the two pictures and where they differ; of two folders, a folder of such files.
        trunk: File of the network's ImageNet weights as torchvision has them; by default they are downloaded once.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.lpips import commands

    commands.compare(first, second, net, trunk=trunk, json_file=json, maps=map, device=device)


def inspect(
    target: tuple[Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"], ...] = ("sm_90",),
    dtype: tuple[Literal["fp16", "bf16", "fp32", "tf32"], ...] = ("fp16", "bf16", "fp32", "tf32"),
    kernel: str = "",
    every: bool = False,
    json: Path | None = None,
    chart: Path | None = None,
    markdown: Path | None = None,
    compare: Path | None = None,
    chips: bool = False,
) -> None:
    """Say what the compiler makes of the kernels, for GPUs that need not be there; nothing is timed.

    Registers, spills, memory, access widths, instructions by pipe, DRAM bytes (counted in Triton's interpreter), and a
    model of the time that each resource of named chips needs.  Compiling all of it takes minutes, once: results are
    cached per user, and what is left to do is said first.
    Ends with exit code 1 if something does not compile or --compare finds it worse.

    Args:
        target: Architectures to compile for.
        dtype: Which element types; tf32 is float32 with TF32 in matrix products.
        kernel: Only entries of the catalogue with this part in their name (variant/layer/operation/pass/dtype/layout),
            as lrn or conv1; where no part is called so, with this text anywhere in it.
        every: All variants, layouts and inference; by default what differs, for training in channels_last.
        json: File for everything that is known, as JSON.
        chart: File (PNG, SVG, ...) for a chart of the modelled times.
        markdown: Markdown file whose tables of kernels and chips are renewed, as docs/kernels.md.
        compare: An older file of --json: what changed, and what is worse (spills, 5 % more instructions).
        chips: Print the constants of the model and their sources, and compile nothing.
    """
    from fastalex.inspection import commands

    if chips:
        commands.print_chips()
        return
    commands.inspect(target, dtype, kernel, every=every, json=json, chart=chart, markdown=markdown, compare=compare)


def describe(
    variant: Literal["demo", "paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet", "bn"] = "paper",
    classes: int = 1000,
    json: Path | None = None,
    chart: Path | None = None,
) -> None:
    """Show what a variant consists of: shapes, neurons, parameters, arithmetic, memory for the backward pass.

    Args:
        variant: Which AlexNet: "demo" is narrow and takes 64x64 pictures, the others have the full size.
        classes: Outputs of the last layer.
        json: File for the same numbers as JSON, in bytes and operations.
        chart: File (PNG) for a chart of them.
    """
    from fastalex.visualize.describe import show

    show(variant, classes, json_file=json, chart=chart)


def plan(
    gpus: int = 8,
    chip: str = "H100",
    recipe: Literal["demo", "paper", "caffe", "torchvision", "fast"] = "fast",
    variant: Literal["paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet", "bn"] | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    set_size: int = 1_281_167,
    json: Path | None = None,
) -> None:
    """Say what training would need and how long it would take on GPUs that need not be there: a model, no measurement.

    Memory, the time of each part of a step, loading, the exchange of gradients, time to the last epoch, and what bounds
    it. `fastalex inspect --chips` and docs/scaling.md have the constants and their sources.

    Args:
        gpus: How many, in machines of 8.
        chip: A100, A10, RTX 4090, H100, H200, B200, RTX 5090 or MI300X.
        recipe: As for `fastalex train`.
        variant: Which AlexNet, by default the recipe's.
        batch_size: Pictures per step, on all GPUs together; by default the recipe's.
        epochs: Passes over the pictures; by default the recipe's.
        set_size: Training pictures, of 256x256; by default ImageNet's.
        json: File for the same numbers as JSON, in bytes and seconds.
    """
    from fastalex.visualize.plan import show

    changes = {"variant": variant, "batch_size": batch_size, "epochs": epochs}
    show(recipe, gpus=gpus, chip=chip, pictures=set_size, json_file=json, **changes)


def pack(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    size: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    val_labels: Path | None = None,
) -> None:
    """Turn pictures into fixed-size records that training reads without decoding them.

    The --data of other commands takes the result.  After an interruption of any kind the same command goes on.

    Args:
        source: Folder with train/CLASS/*.jpg and val/CLASS/*.jpg, with ILSVRC's flat val/ and its labels, with the
            files of CIFAR-10, or with the tars of a WebDataset (KEY.jpg and KEY.cls).
        target: New folder for the records: 197 KB a picture at 256x256, so 262 GB for ImageNet.
        size: Height and width; by default 256, and 32 for CIFAR-10.  The short side is resized, the middle kept.
        on_error: What a damaged or huge picture does: "stop" ends with its path, "skip" leaves it out and lists it.
        workers: Processes that decode, 0 for this one alone; by default one per core.
        val_labels: Labels of a flat val/ folder, one line a picture, where they are not in a file of the usual name.
    """
    from fastalex.data import commands

    commands.pack(source, target, size=size, workers=workers, on_error=on_error, val_labels=val_labels)


def verify(data: Annotated[Path, tyro.conf.Positional]) -> None:
    """Read packed pictures again and compare them with their checksums.

    Args:
        data: A folder that `fastalex pack` wrote.
    """
    from fastalex.data import commands

    commands.verify(data)


def check() -> None:
    """Compare and time everything on this GPU: does it work, and what is gained? See `fastalex check --help`."""
    from fastalex.check.command import main as run

    raise SystemExit(run([]))


def tune(
    variant: tuple[Literal["paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet", "bn"], ...] = ("paper",),
    batch_size: tuple[int, ...] = (128,),
    dtype: tuple[Literal["fp16", "bf16", "fp32"], ...] = ("fp16",),
    inference: bool = False,
    sweep: bool = False,
    out: Annotated[Path | None, "FILE"] = None,
    device: str | None = None,
) -> None:
    """Time the candidates of each layer on this machine's GPU and remember the fastest.

    Later runs on the same GPU architecture with the same versions take what was found, for batches of the same bucket:
    below 32, below 128, below 256, and from 256 on.  The results are one readable file; deleting it undoes everything.
    All cores compile first; then one process times, and a family of kernels that breaks the GPU loses its own alone.

    Args:
        variant: Which AlexNets.
        batch_size: Pictures per step.
        dtype: Of pictures and weights; with mixed precision, the lower one.
        inference: Leave the gradients out.
        sweep: Try other tiles, warps and stages of the fastest Triton convolution too; takes several times as long.
        out: Write this table instead of the user's, which is the one that runs take.
        device: cuda or cpu; by default a GPU if there is one.
    """
    from fastalex.gpu import commands

    commands.tune(variant, dtype, batch_size, training=not inference, sweep=sweep, out=out, device=device)


def bench(
    action: Annotated[Literal["report"], tyro.conf.Positional],
    results: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("runs/bench"),
    keep: Path | None = None,
    readme: Path | None = None,
) -> None:
    """Draw charts of a benchmark's results and print them as a Markdown table, losing rows included.

    The results come from `pytest benchmarks/ --benchmark-only --benchmark-json results.json` in a checkout.

    Args:
        action: "report".
        results: A file of --benchmark-json, the JSON lines of a GPU (runs/bench/lines.jsonl), or a small file that
            --keep wrote.
        out: Folder for the charts: speed-ups, percent of measured rates, memory.
        keep: Folder for the small dated file (medians, ratios, machine), as benchmarks/results.
        readme: README.md of a checkout: its summary is renewed, and the whole table in docs/benchmarks.md beside it.
    """
    from fastalex.visualize.results import report

    report(results, out, keep=keep, readme=readme)


def visualize_filters(weights: str = str(DEMO_MODEL), out: Path = VISUALIZED) -> None:
    """Draw the filters of the first convolution: filters.png, and filters.html, a page that opens offline.

    Args:
        weights: As for `fastalex predict`: a file, by default the demo's model, or IMAGENET1K_V1.
        out: Folder for the results.
    """
    from fastalex.visualize import commands

    commands.filters(weights, out)


def visualize_activations(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    layer: str = "conv1",
    weights: str = str(DEMO_MODEL),
    out: Path = VISUALIZED,
    device: str | None = None,
) -> None:
    """Draw what a layer answers to pictures: a PNG file for each of them, and a page with all that opens offline.

    Args:
        images: Picture files; by default four pictures, as for `fastalex predict`.
        layer: conv1, pool1, conv2, ..., fc6, fc7, fc8, or the path of a module, such as features.0.
        weights: As for `fastalex predict`: a file, by default the demo's model, or IMAGENET1K_V1.
        out: Folder for the results.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.visualize import commands

    commands.maps(weights, images, layer, out, device=device)


def visualize_similar(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    data: Path | None = None,
    count: int = 6,
    weights: str = str(DEMO_MODEL),
    out: Path = VISUALIZED,
    index: Path | None = None,
    device: str | None = None,
) -> None:
    """Find the pictures that a model takes for similar: neighbours in its last hidden layer's features.

    Writes similar.png, and similar.html, a page that opens offline.  The features are kept and used again; after a
    change of pictures only the changed ones are computed.

    Args:
        images: The pictures to find others for; by default six out of the data.
        data: Folder of pictures, or one that `fastalex pack` wrote (its test pictures); by default the Fashion-MNIST
            sample.
        count: How many to find for each.
        weights: As for `fastalex predict`: a file, by default the demo's model, or IMAGENET1K_V1.
        out: Folder for the results.
        index: File for the features; by default index.safetensors in the output folder.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.visualize import commands

    commands.similar_pictures(weights, images, data, count, out, index=index, device=device)


def experiment_relu_vs_tanh(
    data: Path | None = None,
    threshold: float | None = None,
    iterations: int | None = None,
    seeds: int = 5,
    out: Path = Path("runs/relu-vs-tanh"),
    overwrite: bool = False,
    device: str | None = None,
) -> None:
    """The paper's figure 1: iterations to a training error with ReLU, tanh and sigmoid, each at its best learning rate.

    Writes results.json, table.md and figure.png.  A run that was stopped goes on with the same command.

    Args:
        data: Folder of CIFAR-10's files; by default the Fashion-MNIST sample.
        threshold: The training error to reach; by default 0.25 on CIFAR-10, as in the paper, 0.2 on the sample.
        iterations: Where a run gives up; by default 12000 on CIFAR-10, 400 on the sample.
        seeds: Runs for each unit.
        out: Folder for the results.
        overwrite: Drop results in that folder.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.experiments import commands, relu_vs_tanh

    options: dict[str, Any] = {"threshold": threshold, "iterations": iterations, "seeds": seeds, "overwrite": overwrite}
    commands.run(relu_vs_tanh.run, out, data, device=device, **options)


def experiment_ablation(
    data: Path | None = None,
    epochs: int | None = None,
    seeds: int = 5,
    out: Path = Path("runs/ablation"),
    overwrite: bool = False,
    device: str | None = None,
) -> None:
    """What LRN, overlapping pooling, two towers, dropout and augmentation gain, beside the gains in the paper.

    Writes results.json, table.md and figure.png.  A run that was stopped goes on with the same command.

    Args:
        data: Folder of CIFAR-10's files; by default the Fashion-MNIST sample.
        epochs: Of each run; by default 30 on CIFAR-10, 5 on the sample.
        seeds: Runs with everything, and without each ingredient.
        out: Folder for the results.
        overwrite: Drop results in that folder.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.experiments import ablation, commands

    commands.run(ablation.run, out, data, device=device, epochs=epochs, seeds=seeds, overwrite=overwrite)


@functools.cache
def worded(call: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with what tyro shows of its arguments: a word for the value, the docstring's lines joined, and the
    default where it says something.  A text in an annotation is the word of that argument alone."""
    documented = (introspection.getdoc(call) or "").partition("Args:")[2]
    if not documented:  # a group of commands, or one without arguments
        return call
    helps = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", documented, re.MULTILINE))
    hints = get_type_hints(call, include_extras=True)
    for name, kind in hints.items():
        if name == "return":
            continue
        own = next((word for word in getattr(kind, "__metadata__", ()) if isinstance(word, str)), None)
        hints[name] = Annotated[
            kind,
            tyro.conf.arg(
                metavar=own or WORDS.get(name) or _default_word(name, str(kind)),
                help=" ".join(helps[name].split()) if name in helps else None,
                help_behavior_hint=_default_shown,
            ),
        ]
    call.__annotations__ = hints
    return call


def _default_word(name: str, kind: str) -> str | None:
    """None leaves it to tyro: flags have no value, and choices name themselves."""
    if "Literal" in kind or "bool" in kind:
        return None
    number = "N ..." if "tuple" in kind else "N"
    return number if re.search(r"\bint\b", kind) else name.upper().replace("_", "-")


def _default_shown(default: str) -> str:
    return "" if default in ("", "''", "None", "False") else f"(default: {default})"


def group(summary: str, commands: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A command that has commands of its own."""

    def run(command: Any) -> None: ...

    run.__doc__ = summary
    if tyro is not None:
        kinds = tuple(
            Annotated[Any, tyro.conf.subcommand(name, constructor=worded(call))] for name, call in commands.items()
        )
        run.__annotations__ = {"command": Annotated[Union[kinds], tyro.conf.arg(name="")]}  # noqa: UP007, a tuple
    return run


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "convert": convert,
    "lpips": lpips,
    "inspect": inspect,
    "bench": bench,
    "describe": describe,
    "plan": plan,
    "visualize": group(
        "Draw what a model has learnt, as PNG files and pages that open offline.",
        {"filters": visualize_filters, "activations": visualize_activations, "similar": visualize_similar},
    ),
    "experiment": group(
        "Repeat an experiment of the 2012 paper at a scale that two CPU cores can do in minutes.",
        {"relu-vs-tanh": experiment_relu_vs_tanh, "ablation": experiment_ablation},
    ),
    "pack": pack,
    "verify": verify,
    "tune": tune,
    "check": check,
}


def version() -> str:
    """The versions of what computes."""
    import platform
    from importlib import metadata

    import torch

    import fastalex

    parts = [f"fastalex {fastalex.__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("triton", "numba"):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {name}")
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends with one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--version"]:
        print(version())
        return
    if given[:1] == ["check"]:
        # which parses its own arguments: it runs where tyro is missing
        from fastalex.check.command import main as check

        raise SystemExit(check(given[1:]))
    if tyro is None:
        fail("the command line needs tyro: pip install 'fastalex[cli]'")
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    try:
        tyro.cli(
            group("", COMMANDS),
            prog="fastalex",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        fail(f"this command needs {package}: pip install 'fastalex[cli]'")
    except ImportError as error:
        if error.name is not None:  # of Python's own; ours say what to install
            raise
        fail(error)
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("fastalex: stopped", file=sys.stderr)
        raise SystemExit(130) from None

"""The command line: `fastalex demo | pack | verify | train | eval | predict | visualize | experiment | ...`.

`python -m fastalex` is the same program.

One thin function per subcommand; what it needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union

if TYPE_CHECKING:
    import torch

    from fastalex.data.image_sets import ImageSet
    from fastalex.data.preprocessing import Preprocessing

# import name -> why it can be missing: the `cli` extra installs all of them
EXTRAS = ("PIL", "matplotlib", "rich", "safetensors", "torchvision", "tyro")
DEMO_MODEL = Path("runs/demo/model.safetensors")
PUBLISHED = "IMAGENET1K_V1"
VISUALIZED = Path("runs/visualize")


def fail(message: object) -> NoReturn:
    """One line on stderr and exit code 2, as for a wrong argument."""
    print(f"fastalex: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


try:
    import tyro
except ModuleNotFoundError:
    tyro = None  # type: ignore[assignment]  # the commands are functions without it, too; `main` says what is missing


def demo(out: Path = Path("runs/demo"), epochs: int = 24, device: str | None = None) -> None:
    """Train a small AlexNet on the pictures that ship with fastalex, and show what it learnt.

    Prints the five likeliest classes of held-out pictures and writes model.safetensors, metrics.jsonl,
    learning_curve.png, filters.png and predictions.png.  Training took 83 seconds on two cores of an AMD EPYC.

    Args:
        out: Folder for the results.
        epochs: Passes over the 5,000 training pictures.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.demo import run

    run(out, epochs, find_device(device))


def train(
    data: Path | None = None,
    recipe: Literal["demo", "paper", "caffe", "torchvision", "fast"] | None = None,
    variant: Literal["demo", "paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet"] | None = None,
    out: Path = Path("runs/train"),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    label_smoothing: float | None = None,
    amp: Literal["off", "bf16", "fp16"] | None = None,
    accumulate: int = 1,
    compile: bool = False,
    parallel: Literal["data", "hybrid"] = "data",
    deterministic: bool = False,
    device: str | None = None,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    seed: int = 0,
    resume: bool = False,
    save_minutes: float = 10.0,
    save_steps: int | None = None,
    tensorboard: bool = False,
) -> None:
    """Train a model; after every epoch a checkpoint and a line of metrics.jsonl are written to the output folder.

    SIGTERM and Ctrl-C save the state and end the run. On several GPUs: torchrun --nproc-per-node 8 -m fastalex train
    ...

    Args:
        data: Folder with train/CLASS/*.jpg and val/CLASS/*.jpg; by default the Fashion-MNIST sample that ships
            with fastalex.
        recipe: How to train: "paper" (2012), "caffe" (its bvlc_alexnet), "torchvision", "fast" (large batches for
            many GPUs), "demo" (minutes on a CPU). By default "demo", or "paper" with another --variant.
        variant: Which AlexNet, by default the recipe's: "demo" is narrow and takes 64x64 pictures, the others have
            the full size.
        out: Folder for model.safetensors (for eval and predict), state.pt (for --resume) and metrics.jsonl.
        epochs: Passes over the training pictures.
        batch_size: Pictures per step, in all processes together.
        lr: Highest learning rate.
        label_smoothing: Share of the target that is spread over all classes.
        amp: Automatic mixed precision: bf16, or fp16 with loss scaling.
        accumulate: Cut each step's pictures into this many pieces, one after the other, to save memory.
        compile: Pass the model through torch.compile.
        parallel: Of several processes: "data" gives each the whole model, "hybrid" splits the fully connected layers.
        deterministic: Take only algorithms that give the same bits in every run, slower on a GPU.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
        workers: Processes that read pictures from --data, 0 for none; by default one per core, 8 at most.
        on_error: What a damaged picture in a folder does: "stop" ends with its path, "skip" reads every picture once
            before it starts, leaves out what cannot be read, and lists it.
        seed: Of the initial weights, the order of the pictures, the crops and the dropout.
        resume: Go on with the run in the output folder, if there is one.
        save_minutes: How often state.pt is written within an epoch.
        save_steps: Write state.pt after this many steps, too.
        tensorboard: Write metrics for TensorBoard, too, into the output folder.
    """
    import torch

    from fastalex import distributed
    from fastalex.alexnet import VARIANTS, AlexNet
    from fastalex.checkpoint import STATE
    from fastalex.data.image_sets import FashionMNIST
    from fastalex.data.preprocessing import Preprocessing
    from fastalex.training import loop, recipes
    from fastalex.visualize.console import ProgressBar, console

    chosen = recipes.RECIPES[recipe or ("demo" if variant in (None, "demo") else "paper")]
    if variant is not None and variant != "demo":
        chosen = replace(chosen, variant=VARIANTS[variant])
    elif variant == "demo" or chosen is recipes.DEMO_RECIPE:
        chosen = replace(chosen, variant=recipes.demo_variant(channels=1 if data is None else 3))
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "label_smoothing": label_smoothing,
        "amp": amp,
        "seed": seed,
    }
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    options = loop.Options(accumulate, compile, parallel, save_minutes, save_steps, tensorboard)
    if deterministic:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    where = find_device(device)
    if distributed.launched():
        if device is None and where.type == "cuda":
            where = torch.device("cuda", distributed.local_rank())
        workers = max(1, min(8, (os.cpu_count() or 1) // distributed.local_size())) if workers is None else workers
    make = FashionMNIST.preprocessing_for if data is None else Preprocessing.for_photos
    preprocessing = make(chosen.variant.in_channels, chosen.variant.crop)
    images = open_images(data, preprocessing, splits=("train", "test"), workers=workers, on_error=on_error)
    with distributed.process_group(where):
        exists = distributed.from_rank_0((out / STATE).exists())
        if exists and not resume and not distributed.restarted():
            raise ValueError(f"{out} holds a run already: go on with --resume, or choose another folder with --out")
        first = distributed.rank() == 0
        if first:
            if resume and not exists:
                console.print(f"nothing to resume in {out}: starting from the beginning", soft_wrap=True)
            processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
            console.print(
                f"{images.count('train'):,} training pictures of {len(images.classes)} classes, on {where}{processes}"
            )
        torch.manual_seed(chosen.seed)
        model = AlexNet(len(images.classes), chosen.dropout, variant=chosen.variant)
        model = model.to(where).to(memory_format=torch.channels_last)
        bar = ProgressBar(chosen.epochs, images.count("train")) if first else contextlib.nullcontext()
        try:
            with bar as watcher:
                loop.train(model, images, chosen, out, options=options, resume=exists, watcher=watcher)
        except loop.Stopped as stopped:
            if first:
                console.print(f"{stopped}; the same command with --resume goes on with {out}", soft_wrap=True)
            raise SystemExit(128 + stopped.signal) from None
        if first:
            console.print(f"wrote {out}", soft_wrap=True)


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
        weights: A model.safetensors that `fastalex train` or `fastalex demo` wrote, a torchvision .pth file, or
            IMAGENET1K_V1 for torchvision's published weights.
        data: Folder with val/CLASS/*.jpg (or test/CLASS/...); by default the Fashion-MNIST sample.
        crops: "centre", or "ten" crops a picture as in the 2012 paper: corners, centre, and their mirror images.
        out: Folder for scores.json (with every class and the confusion matrix) and confusion.png.
        batch_size: Images per step; of ten crops a tenth as many pictures.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
        workers: Processes that read pictures from --data, 0 for none; by default one per core, 8 at most.
        on_error: What a damaged picture in a folder does: "stop" ends with its path, "skip" reads every picture once
            before it starts, leaves out what cannot be read, and lists it.
    """
    import json

    import torch

    from fastalex.evaluation.classifier import check_classes, load_classifier
    from fastalex.evaluation.metrics import evaluate as scores_of
    from fastalex.evaluation.report import as_json
    from fastalex.files import write_whole
    from fastalex.visualize import figures
    from fastalex.visualize.console import console, print_classes, print_scores

    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    model, card = load_classifier(weights)
    images = open_images(data, card.preprocessing, splits=("test",), workers=workers, on_error=on_error)
    check_classes(card, images.classes)
    where = find_device(device)
    confusion = torch.zeros(len(card.classes), len(card.classes), dtype=torch.int64, device=where)
    scores = scores_of(model.to(where), images, batch_size=batch_size, ten_crop=crops == "ten", confusion=confusion)
    confusion = confusion.cpu()
    print_classes(confusion, card.classes)
    print_scores(scores, images.count("test"))
    if out is not None:
        report = as_json(scores, confusion, card.classes, weights=weights, data=str(data or "sample"), crops=crops)
        write_whole(out / "scores.json", json.dumps(report))
        figures.confusion_matrix(confusion, card.classes, out / "confusion.png")
        console.print(f"wrote {out / 'scores.json'} and {out / 'confusion.png'}", soft_wrap=True)


def predict(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    weights: str = PUBLISHED,
    top: int = 5,
    ten_crop: bool = False,
    out: Path = Path("runs/predict/predictions.png"),
    device: str | None = None,
) -> None:
    """Say what is on pictures: the likeliest classes with their probabilities, in the terminal and as a figure.

    Args:
        images: Picture files (JPEG, PNG, ...); by default four photos that come with scikit-image.
        weights: IMAGENET1K_V1 for torchvision's published weights, which are downloaded once; or a file: torchvision's
            .pth, or a model.safetensors that `fastalex train` or `fastalex demo` wrote.
        top: How many classes to name.
        ten_crop: Average the probabilities of corners, centre and their mirror images, as the 2012 paper.
        out: File (PNG) for the pictures with their classes as bars.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.data.photos import default_photos
    from fastalex.evaluation.classifier import classify, load_classifier, read_picture
    from fastalex.visualize import figures
    from fastalex.visualize.console import console, print_predictions

    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    paths = images or default_photos()
    model, card = load_classifier(weights)
    pictures = [read_picture(path, card.preprocessing) for path in paths]
    probabilities = classify(model.to(find_device(device)), pictures, card.preprocessing, ten_crop=ten_crop)
    print_predictions([str(path) for path in images] or [path.name for path in paths], probabilities, card.classes, top)
    figures.predictions(pictures, [path.name for path in paths], probabilities, card.classes, out, top)
    console.print(f"wrote {out}", soft_wrap=True)


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
    from fastalex.files import write_whole
    from fastalex.lpips.command import compare, pairs_of
    from fastalex.lpips.model import LPIPS
    from fastalex.visualize.console import print_distances

    pairs = pairs_of(first, second)
    loss = LPIPS(net=net, trunk=trunk).to(find_device(device))
    distances = list(compare(loss, pairs, map))
    print_distances(distances)
    if json is not None:
        mean = sum(distance for _, distance in distances) / len(distances)
        found = {"net": net, "version": loss.version, "mean": mean, "distances": dict(distances)}
        write_whole(json, dumps(found, indent=2) + "\n")
    written = [path for path in (json, map) if path is not None]
    if written:
        tell_written(written)


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
    cached per user.  Ends with exit code 1 if something does not compile or --compare finds it worse.

    Args:
        target: Architectures to compile for.
        dtype: Which element types; tf32 is float32 with TF32 in matrix products.
        kernel: Only entries of the catalogue with this text in their name (variant/layer/operation/pass/dtype/layout).
        every: All variants, layouts and inference; by default what differs, for training in channels_last.
        json: File for everything that is known, as JSON.
        chart: File (PNG, SVG, ...) for a chart of the modelled times.
        markdown: Markdown file whose tables of kernels and chips are renewed, as docs/kernels.md.
        compare: An older file of --json: what changed, and what is worse (spills, 5 % more instructions).
        chips: Print the constants of the model and their sources, and compile nothing.
    """
    from fastalex.inspection import machine_code

    if chips:
        print(machine_code.plain(machine_code.chip_table()), end="")
        return
    old = None if compare is None else machine_code.load(compare)
    names = machine_code.names(dtype, kernel, every)
    found = machine_code.rows(names, target)
    if json is not None:
        machine_code.save(json, found)
    if markdown is not None:
        machine_code.write_tables(markdown, found)
    if chart is not None:
        from fastalex.visualize.kernels import modelled_times

        modelled_times(found, chart)
    if old is None:
        print(machine_code.report(found), end="")
        worse = []
    else:
        print(machine_code.comparison(old, found), end="")
        worse = machine_code.regressions(old["rows"], found)
    if worse or any("error" in row for row in found):
        raise SystemExit(1)


def describe(
    variant: Literal["demo", "paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet"] = "paper",
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
    from fastalex.describe import describe as description_of
    from fastalex.files import write_whole
    from fastalex.training.recipes import demo_variant
    from fastalex.visualize import figures
    from fastalex.visualize.console import print_description

    description = description_of(demo_variant() if variant == "demo" else variant, classes)
    print_description(description)
    if json is not None:
        write_whole(json, dumps(description.to_dict(), indent=2) + "\n")
    if chart is not None:
        figures.layers(description, chart)


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
    from fastalex.data.pack import pack as pack_pictures
    from fastalex.visualize.console import PackingBar, console

    try:
        with PackingBar() as bar:
            packed = pack_pictures(
                source, target, size=size, workers=workers, on_error=on_error, val_labels=val_labels, progress=bar
            )
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    counts = ", ".join(f"{count:,} {split}" for split, count in packed.pictures.items())
    skipped = f"; {len(packed.failures):,} could not be read" if packed.failures else ""
    ignored = f"; {packed.ignored:,} files are no pictures" if packed.ignored else ""
    before = packed.resumed == sum(packed.pictures.values()) + len(packed.failures)
    console.print(
        f"{target} was packed before: {counts}{skipped}" if before else f"wrote {target}: {counts}{skipped}{ignored}",
        highlight=False,
        soft_wrap=True,
    )


def verify(data: Annotated[Path, tyro.conf.Positional]) -> None:
    """Read packed pictures again and compare them with their checksums.

    Args:
        data: A folder that `fastalex pack` wrote.
    """
    from fastalex.data.packed import verify as verify_packed
    from fastalex.visualize.console import console

    console.print(f"{data}: {verify_packed(data) / 1e9:.2f} GB as they were written", highlight=False, soft_wrap=True)


def check() -> None:
    """Compare and time everything on this GPU: does it work, and what is gained? See `fastalex check --help`."""
    from fastalex.check.command import main as run

    raise SystemExit(run([]))


def tune(
    variant: tuple[Literal["paper", "code2012", "torchvision", "bvlc_alexnet", "caffenet"], ...] = ("paper",),
    batch_size: tuple[int, ...] = (128,),
    dtype: tuple[Literal["fp16", "bf16", "fp32"], ...] = ("fp16",),
    inference: bool = False,
    out: Path | None = None,
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
        out: Write this table instead of the user's, which is the one that runs take.
        device: cuda or cpu; by default a GPU if there is one.
    """
    from fastalex.gpu.dispatch import table_path
    from fastalex.gpu.tuning import Job, tune

    for size in batch_size:
        if size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {size}")
    where = find_device(device)
    if where.type != "cuda":
        raise ValueError(f"tune times kernels on a GPU, and the device here is {where}")
    path = out or table_path()
    for key, found in tune(Job(variant, dtype, batch_size, not inference), path):
        if isinstance(found, str):
            print(f"{key}: {found}")
            continue
        times = sorted(found.milliseconds.items(), key=lambda item: item[1])
        print(key)
        print("  " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in times) + f" -> {found.candidate}")
        for name, reason in found.refused.items():
            print(f"  {name}: {reason}")
    print(f"wrote {path}")


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
    from fastalex import results as kept
    from fastalex.visualize.results import charts

    result = kept.load(results)
    written = [] if readme is None else kept.replace_tables(readme, result)
    if keep is not None:
        written.append(kept.save(result, keep))
    for path in [*written, *charts(result, out)]:
        print(f"wrote {path}", file=sys.stderr)
    print(kept.markdown(result))


def visualize_filters(weights: str = PUBLISHED, out: Path = VISUALIZED) -> None:
    """Draw the filters of the first convolution: filters.png, and filters.html, a page that opens offline.

    Args:
        weights: IMAGENET1K_V1 for torchvision's published weights, or a file, as for `fastalex predict`.
        out: Folder for the results.
    """
    from fastalex.evaluation.classifier import load_classifier
    from fastalex.visualize import commands

    tell_written(commands.filters(*load_classifier(weights), out))


def visualize_activations(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    layer: str = "conv1",
    weights: str = PUBLISHED,
    out: Path = VISUALIZED,
    device: str | None = None,
) -> None:
    """Draw what a layer answers to pictures: a PNG file for each of them, and a page with all that opens offline.

    Args:
        images: Picture files; by default four photos that come with scikit-image.
        layer: conv1, pool1, conv2, ..., fc6, fc7, fc8, or the path of a module, such as features.0.
        weights: IMAGENET1K_V1 for torchvision's published weights, or a file, as for `fastalex predict`.
        out: Folder for the results.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.data.photos import default_photos
    from fastalex.evaluation.classifier import load_classifier
    from fastalex.visualize import commands

    paths = images or default_photos()
    model, card = load_classifier(weights)
    tell_written(commands.maps(model.to(find_device(device)), card, paths, layer, out))


def visualize_similar(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    data: Path | None = None,
    count: int = 6,
    weights: str = PUBLISHED,
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
        weights: IMAGENET1K_V1 for torchvision's published weights, or a file, as for `fastalex predict`.
        out: Folder for the results.
        index: File for the features; by default index.safetensors in the output folder.
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one.
    """
    from fastalex.evaluation.classifier import load_classifier
    from fastalex.visualize import commands

    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    model, card = load_classifier(weights)
    file = index or out / "index.safetensors"
    model = model.to(find_device(device))
    tell_written(commands.similar_pictures(model, card, data, images, count, file, out, tell))


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
    from fastalex.experiments import relu_vs_tanh

    where = str(find_device(device))
    options: dict[str, Any] = {"threshold": threshold, "iterations": iterations, "seeds": seeds, "overwrite": overwrite}
    with told_how_to_go_on():
        relu_vs_tanh.run(out, data, device=where, **options)
    tell_results(out)


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
    from fastalex.experiments import ablation

    where = str(find_device(device))
    with told_how_to_go_on():
        ablation.run(out, data, epochs=epochs, seeds=seeds, overwrite=overwrite, device=where)
    tell_results(out)


@contextlib.contextmanager
def told_how_to_go_on() -> Iterator[None]:
    """Ctrl-C ends an experiment with a sentence and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        tell("stopped; the same command, without --overwrite, goes on after the last finished run")
        raise SystemExit(130) from None


def tell_results(out: Path) -> None:
    from rich.markdown import Markdown

    from fastalex.visualize.console import console

    console.print(Markdown((out / "table.md").read_text()))
    tell_written([out / name for name in ("results.json", "table.md", "figure.png")])


def tell_written(paths: Sequence[Path]) -> None:
    tell("wrote " + ", ".join(map(str, paths)))


def tell(line: str) -> None:
    from fastalex.visualize.console import console

    console.print(line, soft_wrap=True, highlight=False)


def open_images(
    data: Path | None,
    preprocessing: Preprocessing,
    *,
    splits: tuple[str, ...],
    workers: int | None,
    on_error: Literal["stop", "skip"] = "stop",
) -> ImageSet:
    from fastalex.data.image_sets import FashionMNIST, Folders
    from fastalex.data.packed import PackedSet, is_packed

    if data is None:
        return FashionMNIST(preprocessing)
    if is_packed(data):
        return PackedSet(data, preprocessing, splits=splits, threads=workers)
    folders = Folders(data, preprocessing, splits=splits, workers=workers, on_error=on_error)
    for path, reason in folders.unreadable:
        tell(f"skipped {path}: {reason}")
    return folders


def find_device(name: str | None) -> torch.device:
    """Raises ValueError for a device that PyTorch does not know or cannot reach."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {error}") from None
    return torch.device(name)


def group(summary: str, commands: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A command that has commands of its own."""

    def run(command: Any) -> None: ...

    run.__doc__ = summary
    if tyro is not None:
        kinds = tuple(Annotated[Any, tyro.conf.subcommand(name, constructor=call)] for name, call in commands.items())
        run.__annotations__ = {"command": Annotated[Union[kinds], tyro.conf.arg(name="")]}  # noqa: UP007, a tuple
    return run


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "lpips": lpips,
    "inspect": inspect,
    "bench": bench,
    "describe": describe,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends with one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["check"]:
        # which parses its own arguments: it runs where tyro is missing
        from fastalex.check.command import main as check

        raise SystemExit(check(given[1:]))
    if tyro is None:
        fail("the command line needs tyro: pip install 'fastalex[cli]'")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="fastalex",
            description="AlexNet as fast as the hardware allows: train it, measure it, let it name pictures.",
            args=arguments,
        )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        fail(f"this command needs {package}: pip install 'fastalex[cli]'")
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)

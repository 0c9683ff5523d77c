"""Figure 1 of the paper: how many iterations a four-layer network needs to a given training error, by its unit.

The paper: on CIFAR-10, without regularisation and with a learning rate chosen for each unit, ReLUs reached 25 %
training error six times faster than tanh.  It does not give the network's layers; this one is the three convolutions
and one fully connected layer of the CIFAR-10 network in the authors' cuda-convnet, with half its channels.

For each unit the learning rate is searched in steps of about 3 until both neighbours are slower, with a seed that is
used for nothing else; then runs with the other seeds are timed in iterations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from fastalex.experiments.pictures import load_pictures
from fastalex.experiments.runs import Interval, Result, Store, interval
from fastalex.files import write_whole
from fastalex.visualize.figures import BLUE, DPI, GREEN, VERMILION, save
from fastalex.words import counted

NAME = "relu-vs-tanh"
UNITS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
COLOURS = {"relu": BLUE, "tanh": VERMILION, "sigmoid": GREEN}
STYLES = {"relu": "-", "tanh": "--", "sigmoid": ":"}
CHANNELS = (16, 16, 32)
SWEEP_SEED = 0
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FIRST = RATES.index(0.03)
PAPER_RATIO = 6.0


@dataclass(frozen=True)
class Settings:
    """threshold: the training error to reach.  iterations: where a run gives up.  seeds: runs per unit, from 1 on.

    The error is measured on the same `probe` training pictures, 60 times in `iterations`.
    """

    pictures: str
    threshold: float
    iterations: int
    seeds: int
    batch_size: int = 128
    probe: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"--threshold must lie between 0 and 1, got {self.threshold}")
        if self.iterations < 1 or self.seeds < 1:
            raise ValueError(f"--iterations and --seeds must be at least 1, got {self.iterations} and {self.seeds}")

    @property
    def every(self) -> int:
        return max(1, self.iterations // 60)


class Curve(NamedTuple):
    """The training error after 0, every, 2 * every, ... iterations; `reached` is the iteration of the threshold."""

    errors: list[float]
    reached: int | None

    def rank(self) -> tuple[float, float]:
        """Smaller is better: by iterations, or by the last error where the threshold was not reached."""
        return (math.inf if self.reached is None else self.reached, self.errors[-1])


def network(unit: str, channels: int, size: int) -> nn.Sequential:
    """Three convolutions 5x5 with overlapping pooling, and a fully connected layer to ten classes.

    Weights from N(0, 1/inputs), which suits no unit in particular; the last layer's are ten times smaller, so that
    training starts from even guesses.
    """
    layers: list[nn.Module] = []
    for outputs in CHANNELS:
        layers += [nn.Conv2d(channels, outputs, 5, padding=2), UNITS[unit](), nn.MaxPool2d(3, 2)]
        channels, size = outputs, (size - 3) // 2 + 1
    layers += [nn.Flatten(), nn.Linear(channels * size**2, 10)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            scale = 0.1 if isinstance(layer, nn.Linear) else 1.0
            nn.init.normal_(layer.weight, std=scale * layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def train(
    unit: str,
    rate: float,
    seed: int,
    settings: Settings,
    images: Tensor,
    labels: Tensor,
    limit: int | None = None,
) -> Curve:
    """Plain SGD with momentum until the threshold is reached, `limit` iterations are over or the loss is no number."""
    torch.manual_seed(seed)
    model = network(unit, images.shape[1], images.shape[2]).to(images.device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, fused=True)
    limit = settings.iterations if limit is None else min(limit, settings.iterations)
    probe = torch.randperm(len(images))[: settings.probe].to(images.device)
    order = torch.empty(0, dtype=torch.long)
    errors: list[float] = []
    for iteration in range(limit + 1):
        if iteration % settings.every == 0:
            with torch.no_grad():
                logits = model(images[probe])
            errors.append((logits.argmax(1) != labels[probe]).float().mean().item())
            if errors[-1] <= settings.threshold:
                return Curve(errors, iteration)
            if not logits.isfinite().all():
                break
        if len(order) < settings.batch_size:
            order = torch.randperm(len(images))
        batch, order = order[: settings.batch_size].to(images.device), order[settings.batch_size :]
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return Curve(errors, None)


def search(run: Callable[[float, int | None], Curve]) -> tuple[float, dict[float, Curve]]:
    """The fastest of RATES, and the curves of all that were tried: from the middle up, then down, while it gets faster.

    run: (rate, limit) -> curve.  A run need not go on for longer than the fastest one so far.
    """
    best = FIRST
    tried = {RATES[best]: run(RATES[best], None)}
    for step in (1, -1):
        while 0 <= best + step < len(RATES) and RATES[best + step] not in tried:
            rate = RATES[best + step]
            tried[rate] = run(rate, tried[RATES[best]].reached)
            if tried[rate].rank() >= tried[RATES[best]].rank():
                break
            best += step
    return RATES[best], tried


@functools.lru_cache(maxsize=1)
def _training_data(data: Path | None, device: str) -> tuple[Tensor, Tensor]:
    images, labels, _, _ = load_pictures(data).normalised(device)
    return images, labels


def sweep(unit: str, settings: Settings, data: Path | None, device: str) -> Result:
    images, labels = _training_data(data, device)

    def run(rate: float, limit: int | None) -> Curve:
        return train(unit, rate, SWEEP_SEED, settings, images, labels, limit)

    best, tried = search(run)
    return {"rate": best, "tried": {f"{rate:g}": curve._asdict() for rate, curve in sorted(tried.items())}}


def timed(unit: str, rate: float, seed: int, settings: Settings, data: Path | None, device: str) -> Result:
    return train(unit, rate, seed, settings, *_training_data(data, device))._asdict()


class Finding(NamedTuple):
    """Of one unit.  `ratio` to ReLU's iterations, seed by seed, is None where a run of either gave up; then `at_least`
    says what is certain about it, from the iterations at which tanh or sigmoid gave up."""

    unit: str
    rate: float
    reached: list[int | None]
    iterations: Interval | None
    ratio: tuple[float, float, float] | None
    at_least: float | None


def findings(runs: dict[str, Result], settings: Settings) -> list[Finding]:
    def of(unit: str) -> list[int | None]:
        return [runs[f"{unit} seed {seed}"]["reached"] for seed in range(1, settings.seeds + 1)]

    found = []
    relu = of("relu")
    for unit in UNITS:
        reached = of(unit)
        pairs = list(zip(reached, relu, strict=True))
        ratio = at_least = None
        if all(ours and base for ours, base in pairs):
            mean, half = interval([math.log(ours / base) for ours, base in pairs if ours and base])
            ratio = (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
        elif all(base for _, base in pairs):
            logs = [math.log((ours or settings.iterations) / base) for ours, base in pairs if base]
            at_least = math.exp(sum(logs) / len(logs))
        numbers = [number for number in reached if number is not None]
        iterations = interval([float(n) for n in numbers]) if len(numbers) == len(reached) else None
        found.append(Finding(unit, runs[f"{unit} sweep"]["rate"], reached, iterations, ratio, at_least))
    return found


def run(
    out: Path,
    data: Path | None = None,
    *,
    threshold: float | None = None,
    iterations: int | None = None,
    seeds: int = 5,
    device: str = "cpu",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> list[Finding]:
    """The whole experiment.  Writes results.json, table.md and figure.png to `out`; goes on where it was stopped.

    threshold: by default 25 % on CIFAR-10, as in the paper, and 20 % on the easier sample of Fashion-MNIST.
    iterations: by default 12,000 (30 epochs) on CIFAR-10 and 400 (10 epochs) on the sample.
    report: told what has been done, a line at a time.
    Raises ValueError for settings out of range, or if `out` holds results of others.
    """
    pictures = load_pictures(data)
    settings = Settings(
        pictures.name,
        threshold if threshold is not None else 0.25 if pictures.is_cifar else 0.2,
        iterations if iterations is not None else 12_000 if pictures.is_cifar else 400,
        seeds,
    )
    store = Store(out / "results.json", {"experiment": NAME, **asdict(settings)}, overwrite=overwrite)

    def swept(key: str) -> None:
        report(f"{key.split()[0]}: best learning rate {store.runs[key]['rate']:g}")

    # the slow units first, so that no core is idle at the end
    sweeps = {f"{unit} sweep": unit for unit in reversed(UNITS)}
    store.complete(sweeps, sweep, lambda key: (sweeps[key], settings, data, device), device=device, finished=swept)
    rates = {unit: store.runs[key]["rate"] for key, unit in sweeps.items()}
    timings = {f"{unit} seed {seed}": (unit, seed) for unit in reversed(UNITS) for seed in range(1, seeds + 1)}

    def arguments(key: str) -> tuple[Any, ...]:
        unit, seed = timings[key]
        return unit, rates[unit], seed, settings, data, device

    def finished(key: str) -> None:
        reached = store.runs[key]["reached"]
        report(
            f"{key}: " + (f"{reached:,} iterations" if reached else f"not within {settings.iterations:,} iterations")
        )

    store.complete(timings, timed, arguments, device=device, finished=finished)
    found = findings(store.runs, settings)
    store.write(findings=[finding._asdict() for finding in found])
    write_whole(out / "table.md", table(found, settings))
    draw(found, store.runs, settings, out / "figure.png")
    return found


def table(found: list[Finding], settings: Settings) -> str:
    """Markdown."""
    paper = {"relu": "1", "tanh": "about 6", "sigmoid": "-"}
    lines = [
        f"Iterations (batches of {settings.batch_size}) to {settings.threshold:.0%} training error on "
        f"{settings.pictures}; {counted(settings.seeds, 'seed')}, 95 % confidence intervals.",
        "",
        "| unit | learning rate | iterations | times ReLU's | paper, CIFAR-10 at 25 % |",
        "|---|---|---|---|---|",
    ]
    for unit, rate, reached, iterations, ratio, at_least in found:
        missed = reached.count(None)
        if iterations is None:
            needed = f"{missed} of {len(reached)} runs not within {settings.iterations:,}"
        else:
            needed = with_interval(*iterations)
        if ratio is not None:
            times = f"{ratio[0]:.2f}" + (f" ({ratio[1]:.2f} to {ratio[2]:.2f})" if math.isfinite(ratio[2]) else "")
        else:
            times = "unknown" if at_least is None else f"more than {at_least:.1f}"
        lines.append(f"| {unit} | {rate:g} | {needed} | {'1' if unit == 'relu' else times} | {paper[unit]} |")
    return "\n".join([*lines, "", conclusion(found)]) + "\n"


def conclusion(found: list[Finding]) -> str:
    """What the runs say about tanh, in a sentence."""
    [tanh] = [finding for finding in found if finding.unit == "tanh"]
    if tanh.ratio is None:
        if tanh.at_least is not None and tanh.at_least > 1:
            return f"Shown: ReLU was faster than tanh, more than {tanh.at_least:.1f} times."
        return "Nothing is shown about tanh: runs gave up; --threshold or --iterations can be larger."
    ratio, low, high = tanh.ratio
    if not math.isfinite(high):
        return "Nothing is shown about tanh: one seed has no interval."
    if low > 1:
        return f"Shown: ReLU was faster than tanh, {ratio:.2f} times."
    if high < 1:
        return f"Shown: tanh was faster than ReLU, {1 / ratio:.2f} times."
    return "No difference between ReLU and tanh is shown: the interval of the ratio contains 1."


def with_interval(mean: float, half_width: float) -> str:
    return f"{mean:,.0f}" + (f" ± {half_width:,.0f}" if math.isfinite(half_width) else "")


def draw(found: list[Finding], runs: dict[str, Result], settings: Settings, path: Path) -> None:
    """Left: the curves.  Right: iterations relative to ReLU's, the paper's number beside ours."""
    figure = Figure(figsize=(11, 4.5), dpi=DPI, layout="constrained")
    figure.suptitle(f"Four-layer network on {settings.pictures}: iterations to {settings.threshold:.0%} training error")
    curves, ratios = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for unit, rate, *_ in found:
        for seed in range(1, settings.seeds + 1):
            errors = runs[f"{unit} seed {seed}"]["errors"]
            label = f"{unit}, learning rate {rate:g}" if seed == 1 else None
            steps = [settings.every * i for i in range(len(errors))]
            curves.plot(steps, errors, STYLES[unit], color=COLOURS[unit], alpha=0.75, linewidth=1.3, label=label)
    curves.axhline(settings.threshold, color="0.4", linewidth=1)
    curves.text(0.99, settings.threshold, f"{settings.threshold:.0%}", transform=curves.get_yaxis_transform(),
                ha="right", va="top", color="0.3")  # fmt: skip
    curves.set(
        xlabel=f"iterations (batches of {settings.batch_size})", ylabel="training error", ylim=(0, 1), xlim=(0, None)
    )
    curves.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    curves.legend(title=f"{counted(settings.seeds, 'seed')} each")

    rows: list[tuple[str, float, tuple[float, float] | None, str, str]] = []
    for finding in found[1:]:
        if finding.ratio is not None:
            mean, low, high = finding.ratio
            ends = (mean - low, high - mean) if math.isfinite(high) else None
            rows.append((f"{finding.unit},\nhere", mean, ends, COLOURS[finding.unit], f"{mean:.2f}"))
        elif finding.at_least is not None:
            colour = COLOURS[finding.unit]
            rows.append((f"{finding.unit},\nhere", finding.at_least, None, colour, f"more than {finding.at_least:.1f}"))
        if finding.unit == "tanh":
            rows.append(("tanh, paper:\nCIFAR-10, 25 %", PAPER_RATIO, None, "0.6", "about 6"))
    for place, (_, mean, ends, colour, text) in enumerate(rows):
        ratios.barh(place, mean, height=0.55, color=colour, xerr=None if ends is None else [[ends[0]], [ends[1]]],
                    error_kw={"capsize": 4, "linewidth": 1.2})  # fmt: skip
        ratios.annotate(text, (mean + (ends[1] if ends else 0), place), (5, 0), textcoords="offset points", va="center")
    ratios.axvline(1, color=COLOURS["relu"], linewidth=1.5)
    ratios.set_yticks(range(len(rows)), [label for label, *_ in rows])
    ratios.invert_yaxis()
    ratios.margins(x=0.3)
    ratios.set_xlim(left=0)
    ratios.set(xlabel="iterations, ReLU = 1 (95 % interval)")
    for axes in (curves, ratios):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)

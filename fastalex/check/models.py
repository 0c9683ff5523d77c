"""Whole networks: no further from float64 than PyTorch's own, the same from a CUDA graph, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import backend, timing
from fastalex.alexnet import AlexNet
from fastalex.check.eager import eager_twin
from fastalex.check.kernels import DTYPES, random
from fastalex.check.runner import Context, Item, Row
from fastalex.functional import ResponseNorm
from fastalex.gpu import dispatch
from fastalex.tolerances import UNIT_ROUNDOFF
from fastalex.variants import VARIANTS, Conv, Variant

# On a CPU: every kind of layer, a few thousand weights.
SMALL = Variant(
    "small",
    (
        Conv(8, 5, stride=2, padding=2, norm=ResponseNorm(5, 5e-4, 0.75, 2.0), pool=3),
        Conv(16, 3, padding=1, groups=2, pool=3),
    ),
    crop=32,
    hidden=(32, 32),
    features_size=3,
    init="torch",
)
CLASSES = 1000
# Of 1,300,000 units per image in fp32, 6e-8 of a unit's spread from zero: less than one is expected to flip.
FLIPS = 4


def variants(context: Context) -> dict[str, Variant]:
    names = ("paper", "torchvision", "caffenet")
    return {"small": SMALL} if context.small else {name: VARIANTS[name] for name in names}


def network(variant: Variant, context: Context, dropout: float = 0.0) -> AlexNet:
    """With weights that keep all layers alive: at the paper's initial ones the gradients cancel to nothing."""
    torch.manual_seed(0)
    with torch.device(context.device):
        model = AlexNet(CLASSES, dropout, variant=variant)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.normal_(module.bias, 0.0, 0.1)
    return model


def images_of(variant: Variant, batch: int, context: Context) -> tuple[Tensor, Tensor]:
    images = random((batch, 3, variant.crop, variant.crop), torch.float32, context.device)
    labels = torch.arange(batch, device=context.device) * 7919 % CLASSES
    return images, labels


# ------------------------------------------------------------------------------------------------------------ values
def outputs(model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None) -> list[Tensor]:
    """Logits and the gradients of all parameters, of the sum of squares of the logits over its size."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images)
    loss = F.cross_entropy(logits.double(), labels)
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def distance(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The norm of each error as a share of the norm of what is exact."""
    return [
        ((f.double() - e).norm() / e.norm().clamp_min(1e-30)).nan_to_num(torch.inf).item()
        for f, e in zip(found, exact, strict=True)
    ]


def check_model(name: str, dtype: str, layout: str, context: Context) -> Row:
    """Logits and all gradients against float64, and two runs bit for bit.

    Logits may be twice as far as PyTorch's own in the same dtype, and a unit roundoff: both are sums of the same
    rounding errors in another order.  Gradients jump where rounding decides the sign before a ReLU or the largest cell
    of a window: FLIPS units of the last map may differ besides.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    # some of cuDNN's fp32 gradients add in the order in which threads come
    torch.backends.cudnn.deterministic = True
    variant = variants(context)[name]
    images, labels = images_of(variant, 2 if context.small else 8, context)
    model = network(variant, context)
    with backend.use("reference"):
        exact = outputs(network(variant, context).double(), images.double(), labels, None)
    autocast = DTYPES[dtype.removeprefix("autocast ")] if dtype.startswith("autocast") else None
    real = torch.float32 if autocast else DTYPES[dtype]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    given = images.to(real).contiguous(memory_format=memory)
    eager = eager_twin(model).to(real).to(memory_format=memory)
    theirs = distance(outputs(eager, given, labels, autocast), exact)
    model = model.to(real).to(memory_format=memory)
    found = outputs(model, given, labels, autocast)
    again = outputs(model, given, labels, autocast)
    ours = distance(found, exact)
    names = ["logits", *(n for n, _ in model.named_parameters())]
    units = images.shape[0] * variant.convs[-1].channels * (2 * variant.features_size + 1) ** 2
    jumps = [0.0, *[(FLIPS / units) ** 0.5] * (len(names) - 1)]
    u = UNIT_ROUNDOFF[autocast or real]
    excess = {n: o / (2 * t + u + j) for n, o, t, j in zip(names, ours, theirs, jumps, strict=True)}
    worst = max(excess, key=excess.__getitem__)
    return {
        "ok": excess[worst] <= 1,
        "of_bound": min(excess[worst], 1e30),
        "worst": worst,
        "logits_error": ours[0],
        "eager_logits_error": theirs[0],
        "repeats": all(torch.equal(f, a) for f, a in zip(found, again, strict=True)),
    }


def half_model(context: Context, dropout: float = 0.0) -> tuple[AlexNet, Tensor, Tensor]:
    variant = next(iter(variants(context).values()))
    images, labels = images_of(variant, 8, context)
    model = network(variant, context, dropout).to(torch.float16).to(memory_format=torch.channels_last)
    return model, images.half().contiguous(memory_format=torch.channels_last), labels


def check_captured_step(context: Context) -> Row:
    """The replay of a captured forward and backward pass gives the gradients of a plain one bit for bit."""
    model, images, labels = half_model(context)

    def step() -> list[Tensor]:
        logits = model(images)
        return [logits, *torch.autograd.grad(F.cross_entropy(logits.float(), labels), list(model.parameters()))]

    expected = [t.clone() for t in step()]
    graph, found = timing.capture(step)
    graph.replay()
    torch.cuda.synchronize()
    return {"ok": all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))}


def check_captured_dropout(context: Context) -> Row:
    """Each replay drops other units."""
    model, images, _ = half_model(context, dropout=0.5)
    graph, logits = timing.capture(lambda: model(images))
    drawn = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        drawn.append(logits.detach().clone())
    return {"ok": not torch.equal(*drawn)}


def check_graphed_callable(context: Context) -> Row:
    """torch.cuda.make_graphed_callables: logits and gradients bit for bit."""
    model, images, labels = half_model(context)

    def results(network: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        return [logits.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = results(model)
    found = results(torch.cuda.make_graphed_callables(model, (images,)))
    return {"ok": all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)) and len(found) == len(expected)}


def values(context: Context) -> dict[str, Item]:
    dtypes = ("fp32", "autocast bf16") if context.small else ("fp32", "fp16", "bf16", "autocast bf16")
    items: dict[str, Item] = {
        f"{name} {dtype}/{layout}": partial(check_model, name, dtype, layout, context)
        for name in variants(context)
        for dtype in dtypes
        for layout in ("channels_last", "nchw")
    }
    if context.device == "cuda":
        items["graph/captured step"] = partial(check_captured_step, context)
        items["graph/captured dropout"] = partial(check_captured_dropout, context)
        items["graph/make_graphed_callables"] = partial(check_graphed_callable, context)
    return items


# ------------------------------------------------------------------------------------------------------------- times
# "-loop": as a Python loop sees it, with all launches; the others are replays of a CUDA graph.
PROVIDERS = ("fastalex", "fastalex-loop", "eager", "eager-loop", "eager-nchw")


def inference(variant: Variant, provider: str, batch: int, dtype: str, context: Context) -> Callable[[], Any]:
    layout = torch.contiguous_format if provider.endswith("nchw") else torch.channels_last
    model: nn.Module = network(variant, context).eval()
    if not provider.startswith("fastalex"):
        model = eager_twin(model).eval()  # type: ignore[arg-type]
    model = model.to(DTYPES[dtype]).to(memory_format=layout)
    images = images_of(variant, batch, context)[0].to(DTYPES[dtype]).contiguous(memory_format=layout)
    if provider.startswith("compile"):
        model = compiled(model, provider)  # type: ignore[assignment]

    @torch.no_grad()
    def run() -> Tensor:
        return model(images)

    return run


def training(variant: Variant, provider: str, batch: int, dtype: str, context: Context) -> Callable[[], Any]:
    """A step: forward under autocast, loss, backward, fused SGD with momentum and weight decay, with dropout."""
    layout = torch.contiguous_format if provider.endswith("nchw") else torch.channels_last
    model: nn.Module = network(variant, context, dropout=0.5)
    if not provider.startswith("fastalex"):
        model = eager_twin(model)  # type: ignore[arg-type]
    model = model.to(memory_format=layout)
    images, labels = images_of(variant, batch, context)
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4, fused=context.device != "cpu"
    )
    called: Any = compiled(model, provider) if provider.startswith("compile") else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(context.device, DTYPES[dtype], enabled=dtype != "fp32"):
            loss = F.cross_entropy(called(images).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def compiled(model: nn.Module, provider: str) -> Callable[..., Any]:
    mode = "max-autotune-no-cudagraphs" if provider.endswith("max-autotune") else None
    return torch.compile(model, dynamic=False, mode=mode)


def host_milliseconds(run: Callable[[], Any], context: Context) -> float:
    """Median of a run with all its launches, as a loop without CUDA graphs sees it."""
    found = []
    for number in range(13):
        begin = time.perf_counter()
        run()
        if context.device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def time_model(
    name: str, kind: str, provider: str, batch: int, dtype: str, tuned: list[Row] | None, context: Context
) -> Row:
    """Milliseconds and images per second; `tuned`: with the choices of these rows of the convolutions."""
    if not context.timed and not provider.startswith("fastalex"):
        return {}
    # the library measures its algorithms, for all providers alike
    torch.backends.cudnn.benchmark = context.timed
    variant = variants(context)[name]
    for row in tuned or []:
        measured = dispatch.Measurement(row["chosen"], row["ms"], row["refused"], batch)
        dispatch.remember(row["where"], {row["key"]: measured})
    build = inference if kind == "inference" else training
    run = build(variant, provider, batch, dtype, context)
    if not context.timed:
        run()
        return {}
    if provider.endswith("-loop"):
        milliseconds: float | None = host_milliseconds(run, context)
    else:
        milliseconds = context.milliseconds(run)
    assert milliseconds is not None
    return {"ms": round(milliseconds, 4), "images_per_s": round(1e3 * batch / milliseconds)}


def times(context: Context, tuned: list[Row] | None = None) -> dict[str, Item]:
    if context.small:
        cases = [("small", "inference", 2, "fp32"), ("small", "step", 2, "fp32")]
    else:
        cases = [
            (name, "inference", batch, "fp16") for name in ("paper", "torchvision") for batch in (1, 16, 128, 1024)
        ] + [("paper", "step", batch, "bf16") for batch in (128, 1024)]
        cases.append(("torchvision", "step", 128, "bf16"))
    providers = PROVIDERS if tuned is None else ("fastalex",)
    return {
        f"{name} {kind} {batch} {dtype}/{provider}": partial(
            time_model, name, kind, provider, batch, dtype, tuned, context
        )
        for name, kind, batch, dtype in cases
        for provider in providers
        if tuned is None or batch == 128
    }


def compiled_times(context: Context) -> dict[str, Item]:
    """The strongest opponent, which compiles for half a minute."""
    if context.small:
        return {}
    cases = [("paper", "inference", 128, "fp16"), ("paper", "step", 128, "bf16")]
    return {
        f"{name} {kind} {batch} {dtype}/compile": partial(
            time_model, name, kind, "compile", batch, dtype, None, context
        )
        for name, kind, batch, dtype in cases
    }

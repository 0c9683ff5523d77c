"""The numbers of docs/scaling.md, computed again from the model and the page's own assumptions."""

from pathlib import Path

import pytest
import torch

from fastalex import AlexNet

PAGE = " ".join((Path(__file__).parent.parent / "docs" / "scaling.md").read_text().split())
RECORD, PICTURES = 256 * 256 * 3, 1_281_167
NVLINK, NETWORK = 450e9, 50e9
SPEEDS = (10_000, 100_000)

with torch.device("meta"):
    MODEL = AlexNet(variant="paper")
CONVOLUTIONS, CONNECTED = (sum(p.numel() for p in part.parameters()) for part in (MODEL.features, MODEL.classifier))
PARAMETERS = CONVOLUTIONS + CONNECTED
WIDTHS = sum(layer.in_features for layer in MODEL.classifier if isinstance(layer, torch.nn.Linear)) - 4096 + 1000


def all_reduce(parameters, processes):
    return 2 * (processes - 1) / processes * 4 * parameters


def hybrid(processes, batch):
    return all_reduce(CONVOLUTIONS, processes) + 2 * (processes - 1) / processes * 4 * WIDTHS * batch


def test_inputs():
    assert WIDTHS == 9216 + 4096 + 1000
    for text in (
        f"{RECORD:,} bytes",
        f"{PICTURES * RECORD / 1e9:.1f} GB",
        f"{PARAMETERS:,}: {CONVOLUTIONS:,} in the convolutions, {CONNECTED:,} fully connected",
        f"{4 * PARAMETERS / 1e6:.1f} MB in fp32",
        f"{8 * PARAMETERS / 1e6:.1f} MB, and model.safetensors",
        f"{CONNECTED / PARAMETERS:.0%}".replace("%", " % of the gradients"),
    ):
        assert text in PAGE


def test_arithmetic():
    from fastalex.describe import describe

    layers = describe("paper").layers
    forward = sum(layer.flops for layer in layers) / 1e9
    step = 3 * forward - layers[0].flops / 1e9
    assert f"{forward:.3f} GFLOP a picture forward, {step:.3f} for a training step" in PAGE
    peak = 989e12 / (step * 1e9)
    assert f"{peak / 1000:.0f},000 pictures per second" in PAGE
    assert f"{100_000 / peak:.0%}".replace("%", " % of that peak") in PAGE


def test_pictures():
    rows = {
        "pictures per second": lambda n, s: f"{n * s:,}",
        "bytes per second": lambda n, s: f"{n * s * RECORD / 1e9:,.{1 if n == 8 else 0}f} GB/s",
        "cores that copy, per GPU": lambda n, s: f"{s / 6900:.1f}",
        "cores that decode, per GPU": lambda n, s: f"{s / 276:.0f}",
        "one epoch": lambda n, s: f"{PICTURES / n / s:.{1 if n == 8 else 2}f} s",
    }
    for name, cell in rows.items():
        assert f"| {name} | " + " | ".join(cell(n, s) for n in (8, 1024) for s in SPEEDS) + " |" in PAGE
    assert f"{PICTURES * RECORD / 7e9:.0f} s long" in PAGE
    assert f"{3 * 8 * 100_000 * RECORD / 1e9:.0f} GB/s for 8 GPUs" in PAGE
    assert f"{100_000 * RECORD / 1e9:.1f} GB/s per GPU" in PAGE
    assert f"{128 * PICTURES * RECORD / 1e12:.0f} TB in all" in PAGE


@pytest.mark.parametrize(("gpus", "batch"), [(8, 128), (8, 1024), (8, 4096), (1024, 4096), (1024, 65536)])
def test_steps(gpus, batch):
    link = NVLINK if gpus == 8 else NETWORK
    cells = [f"{1000 * batch / gpus / s:.2f} ms" for s in SPEEDS]
    cells += [f"{1000 * sent / link:.2f} ms" for sent in (all_reduce(PARAMETERS, gpus), hybrid(gpus, batch))]
    assert f"| {gpus:,}, {batch:,} | " + " | ".join(cells) + " |" in PAGE


def test_traffic():
    for text in (
        f"{all_reduce(PARAMETERS, 8) / 1e6:.1f} MB with 8 processes",
        f"{all_reduce(PARAMETERS, 1024) / 1e6:.1f} MB with 1,024",
        f"{all_reduce(CONVOLUTIONS, 8) / 1e6:.1f} MB or {all_reduce(CONVOLUTIONS, 1024) / 1e6:.1f} MB",
        f"{8 * WIDTHS / 1e3:.1f} KB for each picture",
        f"the same at {CONNECTED / WIDTHS:,.0f} pictures per step",
        f"{hybrid(8, 128) / 1e6:.1f} MB instead of {all_reduce(PARAMETERS, 8) / 1e6:.1f} MB",
        *(f"{all_reduce(PARAMETERS, 1024) * 1024 * s / 65536 / 1e9:.0f} GB/s at s = {s:,}" for s in SPEEDS),
    ):
        assert text in PAGE

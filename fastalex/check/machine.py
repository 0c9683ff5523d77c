"""What the machine is, and its two ceilings: the rate of a copy and of a matrix product."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from functools import partial
from importlib import metadata

import torch

from fastalex import __version__
from fastalex.check.kernels import DTYPES, copy_rate, random
from fastalex.check.runner import Context, Item, Row


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def identity(device: str) -> Row:
    """What results hold for: two runs of `check` with another one do not share a file."""
    row: Row = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "fastalex": __version__,
        "device": platform.processor() or platform.machine(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return row


def clocks() -> Row:
    """The card's clocks and power as found, and whether Triton finds a C compiler for its launcher."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        found = subprocess.run(
            ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        found = f"unknown: {type(error).__name__}"
    return {fields: found, "gcc": shutil.which("gcc") or shutil.which("cc") or "missing"}


def copy(context: Context) -> Row:
    return {"gb_s": round(copy_rate(context.device), 1)} if context.timed else {}


def product(dtype: str, context: Context) -> Row:
    """TFLOP/s of a square matrix product of random data."""
    size = 256 if context.small else 8192
    a, b = (random((size, size), DTYPES["fp32" if dtype == "tf32" else dtype], context.device, i) for i in (0, 1))
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    milliseconds = context.milliseconds(lambda: a @ b)
    return {} if milliseconds is None else {"tflop_s": round(2 * size**3 / milliseconds / 1e9, 2)}


def times(context: Context) -> dict[str, Item]:
    dtypes = ("fp32",) if context.small else ("fp16", "bf16", "tf32")
    items: dict[str, Item] = {"clocks": clocks, "copy": partial(copy, context)}
    return items | {f"product {dtype}": partial(product, dtype, context) for dtype in dtypes}

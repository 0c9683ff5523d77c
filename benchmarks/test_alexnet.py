"""Inference and training steps of the whole network, and three workloads with published times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Case, Race
from benchmarks.models import inference_race, training_race
from benchmarks.providers import MODEL, QUICK, TRAINING, entries
from fastalex.variants import TORCHVISION, Conv, Variant

BATCHES = (1, 16, 128, 1024)
VARIANTS = ("paper", "torchvision", "caffenet")
SIZE = {"paper": 224, "torchvision": 224, "caffenet": 227, "": 224}


def cases(passes: str, dtypes: tuple[str, ...], batches: tuple[int, ...], layer: str = "") -> list[Case]:
    size = SIZE[layer]
    return [Case("alexnet", passes, dtype, (batch, 3, size, size), layer) for dtype in dtypes for batch in batches]


INFERENCE_CUDA = [
    case
    for variant in VARIANTS
    for case in cases("inference", ("tf32", "fp16", "bf16") if variant == "paper" else ("fp16",), BATCHES, variant)
] + cases("inference", ("fp32",), (128,), "paper")
INFERENCE_CPU = [
    *cases("inference", ("fp32", "bf16"), (1, 16), "paper"),
    *cases("inference", ("fp32",), (16,), "torchvision"),
]


INFERENCE_CPU_LONG = cases("inference", ("fp32", "bf16"), (32,), "paper")


def quick_inference(case: Case) -> Sequence[str]:
    quick = case.layer in ("paper", "torchvision") and case.dtype == "fp16" and case.shape[0] in (1, 128)
    return QUICK if quick else ()


def prepare_inference(case: Case, names: list[str]) -> Race:
    return inference_race(case, names, case.layer)


@entries(
    INFERENCE_CPU,
    INFERENCE_CUDA,
    MODEL,
    cpu_compile=INFERENCE_CPU[1:2],
    cpu_long=INFERENCE_CPU_LONG,
    cuda_quick=quick_inference,
)
def test_inference(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare_inference)


TRAINING_CUDA = [
    case
    for variant in VARIANTS
    for case in cases("step", ("tf32", "bf16") if variant == "paper" else ("bf16",), (128, 1024), variant)
] + cases("step", ("fp32",), (128,), "paper")
TRAINING_CPU = cases("step", ("fp32", "bf16"), (8,), "paper")
TRAINING_CPU_LONG = cases("step", ("fp32", "bf16"), (32,), "paper")


def quick_step(case: Case) -> Sequence[str]:
    return QUICK if (case.layer, case.dtype, case.shape[0]) == ("paper", "bf16", 128) else ()


def prepare_step(case: Case, names: list[str]) -> Race:
    return training_race(case, names, case.layer)


@entries(TRAINING_CPU, TRAINING_CUDA, TRAINING, cpu_long=TRAINING_CPU_LONG, cuda_quick=quick_step)
def test_training_step(case: Case, provider: str, contest: Any) -> None:
    contest(case, provider, prepare_step)


def prepare_convnet_benchmarks(case: Case, names: list[str]) -> Race:
    return training_race(case, names, TORCHVISION, dropout=0.0, update=False)


@entries([], cases("step", ("tf32", "fp16"), (128,)), TRAINING)
def test_convnet_benchmarks(case: Case, provider: str, contest: Any) -> None:
    """soumith/convnet-benchmarks, AlexNet: 128x3x224x224, forward and backward, no dropout, no update.

    The best published time is 71 ms, on a Titan X in fp16.  Its loss was a sum; here it is the cross-entropy, a
    thousandth of the work.
    """
    contest(case, provider, prepare_convnet_benchmarks)


# One column without groups or normalisation.
KERNELBENCH = Variant(
    "kernelbench",
    (
        Conv(96, 11, stride=4, padding=2, pool=3),
        Conv(256, 5, padding=2, pool=3),
        Conv(384, 3, padding=1),
        Conv(384, 3, padding=1),
        Conv(256, 3, padding=1, pool=3),
    ),
    init="torch",
)


def quick_kernelbench(case: Case) -> Sequence[str]:
    """With max-autotune once, which compiles for minutes."""
    return {"tf32": ("fastalex", "eager", "compile"), "fp16": (*QUICK, "compile-max-autotune")}.get(case.dtype, ())


def prepare_kernelbench(case: Case, names: list[str]) -> Race:
    return inference_race(case, names, KERNELBENCH)


@entries([], cases("inference", ("fp32", "tf32", "fp16"), (1024,)), MODEL, cuda_quick=quick_kernelbench)
def test_kernelbench_level3_problem5(case: Case, provider: str, contest: Any) -> None:
    """ScalingIntelligence/KernelBench, level 3, problem 5: 1024x3x224x224, inference.

    Published for an H100: 23.7 ms eager, 16.7 ms compiled.
    """
    contest(case, provider, prepare_kernelbench)


def prepare_torchvision_inference(case: Case, names: list[str]) -> Race:
    return inference_race(case, names, TORCHVISION)


@entries([], cases("inference", ("tf32", "fp16"), (256,)), MODEL)
def test_torchvision_batch256_inference(case: Case, provider: str, contest: Any) -> None:
    """torchvision.models.alexnet at batch 256."""
    contest(case, provider, prepare_torchvision_inference)


def prepare_torchvision_step(case: Case, names: list[str]) -> Race:
    return training_race(case, names, TORCHVISION)


@entries([], cases("step", ("tf32", "bf16"), (256,)), TRAINING)
def test_torchvision_batch256_training_step(case: Case, provider: str, contest: Any) -> None:
    """torchvision.models.alexnet at batch 256, a step of its training."""
    contest(case, provider, prepare_torchvision_step)

"""What a run on a GPU will take: modelled, for an H100 with 16 CPU cores and nothing compiled before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from benchmarks.harness import Case

# Seconds of one provider of one case, by kind
SECONDS = {
    "operation": 1.0,
    "network": 2.5,
    "operation, torch.compile": 8.0,
    "network, torch.compile": 30.0,
    "training step, torch.compile": 60.0,
    "operation, max-autotune": 20.0,
    "network, max-autotune": 120.0,
}
# To start, and to compile our kernels in several processes, which are few where most providers are others
START_SECONDS = 15.0
KERNEL_SECONDS = 1.5
MOST_PROCESSES = 8


def kind(case: Case, provider: str) -> str:
    compiler = {"compile": ", torch.compile", "compile-max-autotune": ", max-autotune"}.get(provider, "")
    if case.operation not in ("alexnet", "lpips"):
        return f"operation{compiler}"
    step = case.passes == "step" and provider == "compile"
    return f"{'training step' if step else 'network'}{compiler}"


def seconds(case: Case, provider: str) -> float:
    return SECONDS[kind(case, provider)]


def limit(case: Case, provider: str) -> float:
    """Seconds after which a provider is stopped: our kernels may have to be compiled."""
    return 90 + 2 * seconds(case, provider)


def first(runs: Iterable[tuple[Case, str]]) -> float:
    """Seconds before the first provider is timed."""
    return START_SECONDS + KERNEL_SECONDS * len({case for case, provider in runs if provider.startswith("fastalex")})


def total(runs: list[tuple[Case, str]]) -> float:
    return first(runs) + sum(seconds(*run) for run in runs)


def table(runs: list[tuple[Case, str]]) -> list[str]:
    """Lines for the head of a run."""
    lines = [
        f"benchmarks: {len(runs)} provider runs in {len({case for case, _ in runs})} cases, modelled to take "
        f"{total(runs) / 60:.0f} minutes on an H100 with nothing compiled:",
        f"  {first(runs):5.0f} s  start, our kernels compiled in parallel processes",
    ]
    found = Counter(kind(*run) for run in runs)
    lines += [f"  {n * SECONDS[name]:5.0f} s  {name}: {n} x {SECONDS[name]:g} s" for name, n in found.items()]
    return lines

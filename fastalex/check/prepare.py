"""Kernels compiled before there is a GPU, into a cache that can be taken along, and how many were found in it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Of the catalogue's launches: images of the checks and of the times.
BATCHES = (1, 5, 128, 130, 1024)
VARIANTS = ("paper", "torchvision", "caffenet")


@contextlib.contextmanager
def compilations() -> Iterator[dict[str, int]]:
    """{"compiled": kernels that the block compiled, "cached": those that lay in Triton's cache}."""
    import triton

    found = {"compiled": 0, "cached": 0}

    def listen(*, cache_hit: bool, **rest: Any) -> None:
        found["cached" if cache_hit else "compiled"] += 1

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def entries() -> list[str]:
    """The catalogue's entries that `check` runs, those that compile longest first."""
    from fastalex.inspection import catalog

    found = [name for name, entry in catalog.ENTRIES.items() if entry.variant in VARIANTS]
    return sorted(found, key=lambda name: "/lrn_max_pool/" not in name)


def compile_entry(name: str, target: str, batches: Sequence[int]) -> tuple[str, dict[str, int], str | None]:
    """Compile what an entry launches at each batch.  Returns its name, what `compilations` counted, and an error."""
    import triton

    from fastalex.inspection import catalog, compiler

    triton.runtime.driver.set_active(compiler.NamedTarget(target))
    error = None
    with compilations() as found:
        for batch in batches:
            try:
                for launch in catalog.launches(catalog.ENTRIES[name], batch):
                    launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants)
            except Exception as failure:  # told, and the others go on
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    return name, found, error


def prepare(folder: Path, target: str, names: Sequence[str], batches: Sequence[int] = BATCHES) -> int:
    """Compile the entries for a GPU that need not be there, on all cores; prints progress, returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    failed, counts = [], {"compiled": 0, "cached": 0}
    # a new interpreter each: this one may have decided on Triton's interpreter or a driver already
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_entry, name, target, batches) for name in names]
        for number, job in enumerate(jobs, 1):
            name, found, error = job.result()
            counts = {key: counts[key] + found[key] for key in counts}
            if error is not None:
                failed.append(name)
                print(f"{name}: {error}", flush=True)
            if number % 25 == 0 or number == len(jobs):
                print(f"{number} of {len(jobs)}, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{counts['compiled']} kernels compiled for {target}, {counts['cached']} were there: {folder}")
    return 1 if failed else 0

"""The GPUs that modelled times are stated for: every constant of the model, with its source.

Clocks are those at which the published matrix rate holds: rate / (multiprocessors x FLOP per clock and
multiprocessor).  A GPU under load may run slower, or a little faster; nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor can hold and do.

    shared: bytes of shared memory.  lanes: threads per clock that each pipe executes; "issue" is what the four
    schedulers start together.
    """

    warps: int
    blocks: int
    shared: int
    lanes: dict[str, int]
    registers: int = 65536


def _lanes(fma: int) -> dict[str, int]:
    return {"issue": 128, "fma": fma, "alu": 64, "xu": 16, "lsu": 32}


# Limits and lanes: CUDA C++ Programming Guide, tables "Technical Specifications per Compute Capability" and "Throughput
# of Native Arithmetic Instructions" (fma: 32-bit add and multiply-add; alu: 32-bit integer; xu: reciprocal, root,
# logarithm; lsu: warp shuffle).
ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164 << 10, _lanes(fma=64)),
    "sm_86": Architecture(48, 16, 100 << 10, _lanes(fma=128)),
    "sm_89": Architecture(48, 24, 100 << 10, _lanes(fma=128)),
    "sm_90": Architecture(64, 32, 228 << 10, _lanes(fma=128)),
    "sm_100": Architecture(64, 32, 228 << 10, _lanes(fma=128)),
    "sm_120": Architecture(48, 24, 100 << 10, _lanes(fma=128)),
}


@dataclass(frozen=True)
class Chip:
    """One product.

    clock: GHz.  dram: TB/s.  matrix_fp16 (and bf16), matrix_tf32: TFLOP/s, dense, sums in fp32.  memory: GB.
    link: GB/s that it sends to the others of its machine while it receives as much, over NVLink, Infinity Fabric, or
    PCI Express where it has neither.  host: GB/s from the machine's memory, over PCI Express with 16 lanes.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    dram: float
    matrix_fp16: float
    matrix_tf32: float
    source: str
    memory: float
    link: float
    host: float


# PCI Express with 16 lanes, one direction: 16 or 32 GT/s a lane, 128 of 130 bits of data
PCIE_4, PCIE_5 = 31.5, 63.0

CHIPS = (
    Chip("A100", "sm_80", 108, 1.41, 2.039, 312, 156, "NVIDIA A100 datasheet, SXM 80 GB", 80, 300, PCIE_4),
    Chip("A10", "sm_86", 72, 1.695, 0.6, 125, 62.5, "NVIDIA A10 datasheet", 24, PCIE_4, PCIE_4),
    Chip(
        "RTX 4090",
        "sm_89",
        128,
        2.52,
        1.008,
        165.2,
        82.6,
        "NVIDIA Ada architecture whitepaper, appendix A",
        24,
        PCIE_4,
        PCIE_4,
    ),
    Chip("H100", "sm_90", 132, 1.83, 3.35, 989.4, 494.7, "NVIDIA H100 datasheet, SXM", 80, 450, PCIE_5),
    Chip("H200", "sm_90", 132, 1.83, 4.8, 989.4, 494.7, "NVIDIA H200 datasheet, SXM", 141, 450, PCIE_5),
    Chip("B200", "sm_100", 148, 1.86, 8.0, 2250, 1125, "NVIDIA HGX B200 datasheet, per GPU", 180, 900, PCIE_5),
    Chip(
        "RTX 5090",
        "sm_120",
        170,
        2.407,
        1.792,
        209.5,
        104.8,
        "NVIDIA RTX Blackwell architecture whitepaper, appendix A",
        32,
        PCIE_5,
        PCIE_5,
    ),
    Chip("MI300X", "gfx942", 304, 2.1, 5.3, 1307.4, 653.7, "AMD Instinct MI300X datasheet", 192, 448, PCIE_5),
)


def find_chip(name: str) -> Chip:
    """The chip of this name, in any case.  Raises ValueError for one whose constants are not here."""
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    raise ValueError(f"chip must be one of {', '.join(chip.name for chip in CHIPS)}, got {name!r}")


def resident_warps(target: str, *, registers: int, shared: int, warps: int) -> int | None:
    """Warps that fit on one multiprocessor at a time, None for a target that is not NVIDIA's.

    registers: per thread, given out in units of 8.  shared: bytes per program, to which the system adds 1 KiB.
    warps: per program.
    """
    limits = ARCHITECTURES.get(target)
    if limits is None:
        return None
    units = -(-registers // 8) * 8
    programs = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // (units * 32) // warps,
        limits.shared // (shared + 1024),
    )
    return programs * warps


def times(
    chip: Chip, *, pipes: dict[str, float], dram_bytes: float | None, flops: float = 0, dtype: str = "fp16"
) -> dict[str, float]:
    """Seconds that each resource of the chip is busy, if it alone set the pace: a model, not a measurement.

    pipes: instructions that threads issue, by pipe; what is not known may be missing.  flops: of matrix products in
    `dtype`: "fp16", "bf16" and "tf32" on the matrix units, "fp32" on the fma pipe.
    """
    busy = {}
    limits = ARCHITECTURES.get(chip.target)
    if limits is not None and pipes:
        rate = chip.multiprocessors * chip.clock * 1e9
        busy["issue"] = sum(pipes.values()) / (rate * limits.lanes["issue"])
        busy |= {pipe: pipes.get(pipe, 0) / (rate * lanes) for pipe, lanes in limits.lanes.items() if pipe != "issue"}
    if flops and dtype == "fp32" and limits is not None:
        rate = chip.multiprocessors * chip.clock * 1e9 * limits.lanes["fma"]
        busy["fma"] = max(busy.get("fma", 0), flops / 2 / rate)
    elif flops:
        busy["matrix"] = flops / (1e12 * (chip.matrix_tf32 if dtype == "tf32" else chip.matrix_fp16))
    if dram_bytes is not None:
        busy["DRAM"] = dram_bytes / (chip.dram * 1e12)
    return busy

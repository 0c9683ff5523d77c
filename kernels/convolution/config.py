"""How the convolutions cut their work: one `Config` for all, the heuristics, and what `tune` may try instead."""

import functools
import re
from dataclasses import dataclass, replace

import torch
import triton

from .implicit_gemm import NARROWEST, capability

# Programs that fill a large GPU once: 132 multiprocessors.
ENOUGH_PROGRAMS = 132
# A part of the forward sum shorter than this spends its time filling the pipeline.
MIN_STEPS = 4
# A tile of 128 x 96 sums is 96 registers per thread with 4 warps, and its narrowest copies are wider than with 8.
FOUR_WARPS = 128 * 96
# Of shared memory, for the pipeline of sm_90 and sm_100: 227 KB less the tile that is stored.
PIPELINE_BYTES = 200 * 1024
# Programs of the weight gradient, two waves on 132 multiprocessors; the sum over outputs and images is split for it.
WEIGHT_GRAD_PROGRAMS = 264
# Steps of a part of it: 16 of 64 images for 128x128 results take longer than writing and reading the results in fp32.
WEIGHT_GRAD_STEPS = 16


@dataclass(frozen=True)
class Config:
    """A program makes block_m x (block_n[0] + block_n[1]) results, block_k[0] + block_k[1] terms of the sum per step.

    block_n, block_k: one tile and one tail each, a tail of 0 for none (`split_tile`).  warp_specialize: copies and
    products in warps of their own.  split_k: parts of the sum, in programs of their own.
    """

    block_m: int
    block_n: tuple[int, int]
    block_k: tuple[int, int]
    num_warps: int
    num_stages: int
    warp_specialize: bool = False
    split_k: int = 1

    @property
    def tile(self):
        """The kernels' TILE: BLOCK_M, BLOCK_N, BLOCK_N_TAIL, BLOCK_K, BLOCK_K_TAIL, WARP_SPECIALIZE."""
        return (self.block_m, *self.block_n, *self.block_k, self.warp_specialize)

    def __str__(self):
        """As "128x64+32x64 w4 s3", then "ws" and "k2" where warps are specialised and the sum is split."""
        n, k = ("+".join(str(width) for width in pair if width) for pair in (self.block_n, self.block_k))
        rest = " ws" * self.warp_specialize + (f" k{self.split_k}" if self.split_k > 1 else "")
        return f"{self.block_m}x{n}x{k} w{self.num_warps} s{self.num_stages}{rest}"

    @classmethod
    def parse(cls, text):
        """The Config that `str` wrote.  Raises ValueError for another text."""
        match = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+))?x(\d+)(?:\+(\d+))? w(\d+) s(\d+)( ws)?(?: k(\d+))?", text)
        if match is None:
            raise ValueError(f"a configuration reads as 128x64+32x64 w4 s3, got {text!r}")
        m, n, n_tail, k, k_tail, num_warps, stages, specialize, split = match.groups(default="0")
        return cls(
            int(m), (int(n), int(n_tail)), (int(k), int(k_tail)), int(num_warps), int(stages),
            specialize != "0", max(1, int(split)),
        )  # fmt: skip


def split_tile(count, limit):
    """Two widths of tile (a, b), b = a / 2 or 0, powers of two, for `count` channels; a is at most `limit`.

    The widest a + b that divides the count, but `limit` alone if it does: 96 = 64 + 32, 192 = 128 + 64, 48 = 32 + 16.
    Padding them to a power of two instead would waste a quarter of the tile.  A count that nothing divides gets the
    widest tile that wastes the least, or within a quarter of that.
    """
    widths = [NARROWEST << i for i in range(8) if NARROWEST << i <= limit]
    pairs = [(a, 0) for a in widths] + [(a, a // 2) for a in widths if a > NARROWEST]
    if count % limit == 0:
        return limit, 0
    whole = [pair for pair in pairs if count % sum(pair) == 0]
    if whole:
        return max(whole, key=sum)
    padded = {a: triton.cdiv(count, a) * a for a in widths}
    return max(a for a in widths if padded[a] <= 1.25 * min(padded.values())), 0


def power_of_2(value, highest):
    """The power of 2 at or above value, between the narrowest tile and `highest`."""
    return min(max(triton.next_power_of_2(value), NARROWEST), highest)


def dividing_power_of_2(value, highest):
    """The largest power of 2 that divides value, between the narrowest tile and `highest`."""
    return min(max(value & -value, NARROWEST), highest)


def widest_k(dtype, precision):
    """128 bytes of a row, the widest swizzle of shared memory; products without tensor cores reread it and gain
    nothing from so much."""
    return 16 if dtype == torch.float32 and precision == "ieee" else 128 // dtype.itemsize


# --------------------------------------------------------------------------------------------------------- forward
@functools.lru_cache(maxsize=1024)
def forward_config(algorithm, images, pixels, weight_shape, groups, dtype, precision, target):
    """For `pixels` = OH * OW outputs of each image, on a GPU of this `capability`."""
    features, channels = weight_shape[0] // groups, weight_shape[1]
    ieee = dtype == torch.float32 and precision == "ieee"
    # wgmma and tcgen05, which want 128 rows and read tiles from shared memory
    large = target in (90, 100) and not ieee
    block_k = split_tile(channels, widest_k(dtype, precision))
    # products without tensor cores need registers for their factors, too
    four_warps = 64 * 64 if ieee else FOUR_WARPS

    if algorithm in ("batch_tiled", "descriptors"):
        # powers of two: what is compiled does not follow every batch
        block_m = min(128, max(128 if large else 16, triton.next_power_of_2(images)))
        block_n = (128, 64) if large and features % 192 == 0 else split_tile(features, 128)
        # L2 to shared memory, bytes per multiply-add: 256 x 128 needs 3/4 of 128 x 128, and 256 x 192 7/12.  Twice
        # the threads would halve the copies of a narrow tile of weights, which TMA does not mind.
        wide = algorithm == "descriptors" or sum(block_n) >= 128
        if large and wide and dtype.itemsize == 2 and triton.cdiv(images, 256) * 2 <= triton.cdiv(images, 128):
            block_m = 256
        if ieee and algorithm == "descriptors":
            # tiles of TMA lie across what FFMA reads, which takes registers: 443 spills with 128 x 128
            block_n = split_tile(features, 32 if features % 64 else 64)
            return Config(block_m, block_n, block_k, min(8, block_m // 16), 3)
        # AMD has 64 KB of shared memory
        stages = 3 if target else 2
        if algorithm == "descriptors" and target == 90:
            stages = min(4, PIPELINE_BYTES // ((block_m + sum(block_n)) * sum(block_k) * dtype.itemsize))
        # 16 rows each: beyond that, warps would compute the same
        num_warps = min(4 if block_m * sum(block_n) <= four_warps else 8, block_m // 16)
        return Config(block_m, block_n, block_k, num_warps, stages, algorithm == "descriptors" and target == 100)

    block_m = 128
    # 64 x 64 makes four programs of one and needs twice the bytes from L2 per multiply-add
    if algorithm == "split_k" or images * pixels * weight_shape[0] < 128 * 128 * ENOUGH_PROGRAMS // 2:
        block_m = 64
    block_n = split_tile(features, block_m)
    split_k = 1
    if algorithm == "split_k":
        programs = triton.cdiv(images * pixels, block_m) * triton.cdiv(features, sum(block_n)) * groups
        steps = weight_shape[2] * weight_shape[3] * triton.cdiv(channels, sum(block_k))
        split_k = max(1, min(triton.cdiv(ENOUGH_PROGRAMS, programs), steps // MIN_STEPS))
        # as many as there are, none empty
        split_k = triton.cdiv(steps, triton.cdiv(steps, split_k))
    if dtype == torch.float32 and channels % sum(block_k):
        # masked, and loaded one by one: with 4 warps, the addresses of so many rows are 4 to 36 spills
        four_warps //= 2
    num_warps = 4 if block_m * sum(block_n) <= four_warps else 8
    # the pipeline holds one tile less than it has stages; a third one of 128 x 192, or in tf32 of 48 channels, would be
    # too much for the 99 KB of sm_86, sm_89 and sm_120
    three = 3 * (block_m + sum(block_n)) * sum(block_k) * dtype.itemsize
    fits = sum(block_n) <= 128 and not (target in (86, 89, 120) and three > 99 * 1024)
    stages = (4 if fits else 3) if target else 2
    return Config(block_m, block_n, block_k, num_warps, stages, split_k=split_k)


# ------------------------------------------------------------------------------------------------------- gradients
def gradient_config(block_m, block_n, block_k, dtype, descriptors):
    """What the target makes of a tile of a gradient."""
    target = capability()
    # 192 columns fill the registers of a warp and the 64 KB of an AMD workgroup: shorter steps, more in flight
    crowded = sum(block_n) > 128 and target < 90 and dtype.itemsize == 2
    if crowded:
        block_k = min(block_k, 32)
    # 8 warps for large tiles, unless that leaves a thread less than 16 bytes of the narrower operand to copy
    narrow = block_k * (block_n[1] or block_n[0]) * dtype.itemsize
    num_warps = 8 if block_m * sum(block_n) >= FOUR_WARPS and narrow >= 8 * 32 * 16 else 4
    # copies and products in warps of their own: 62 instead of 115 instructions a step.  The compiler crashes over it on
    # sm_90 with 4 warps, and on sm_100 for products too small for tensor memory (Triton 3.8)
    specialize = descriptors and target == 100 and block_m >= 64
    return Config(block_m, block_n, (block_k, 0), num_warps, 4 if crowded else 3, specialize)


def input_grad_config(images, channels, outputs, dtype, descriptors, precision):
    """For `channels` input and `outputs` output channels per group."""
    large = descriptors and dtype.itemsize == 2 and capability() in (90, 100)
    # by powers of two: what is compiled does not depend on the exact batch
    block_m = power_of_2(images, 256 if large else 128)
    block_k = dividing_power_of_2(outputs, widest_k(dtype, precision))
    return gradient_config(block_m, split_tile(channels, 128), block_k, dtype, descriptors)


def weight_grad_config(images, channels, outputs, taps, pixels, groups, dtype, descriptors, precision):
    """For `channels` input and `outputs` output channels per group, `taps` = R * S, `pixels` = OH * OW."""
    block_m = dividing_power_of_2(outputs, 128) if outputs % NARROWEST == 0 else power_of_2(outputs, 64)
    if outputs > 32 and capability() in (90, 100):
        # less goes to the matrix instructions of sm_80, at half the speed or less: padding 96 to 128 costs a quarter
        block_m = max(block_m, 64)
    block_k = power_of_2(images, widest_k(dtype, precision))
    config = gradient_config(block_m, split_tile(channels, 128), block_k, dtype, descriptors)
    tiles = triton.cdiv(outputs, block_m) * triton.cdiv(channels, sum(config.block_n)) * taps * groups
    steps = pixels * triton.cdiv(images, config.block_k[0])
    split_k = max(1, min(triton.cdiv(WEIGHT_GRAD_PROGRAMS, max(1, tiles)), steps // WEIGHT_GRAD_STEPS))
    return replace(config, split_k=split_k)


def candidates(config):
    """What a sweep tries beside the heuristic's choice, as texts: half the rows, other warps, a stage more or less."""
    found = {
        replace(config, block_m=block_m, num_warps=num_warps, num_stages=num_stages)
        for block_m in (max(NARROWEST, config.block_m // 2), config.block_m)
        for num_warps in (4, 8)
        for num_stages in (max(2, config.num_stages - 1), config.num_stages, config.num_stages + 1)
    }
    return sorted(map(str, found - {config}))

"""The sizes that the suites time: AlexNet's layers, batches and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastalex.variants import VARIANTS, Conv

# size, alpha, beta, k of the paper, as torch counts alpha
NORM = (5, 5e-4, 0.75, 2.0)
NORM_LAYERS = {"conv1": (96, 55, 55), "conv2": (256, 27, 27)}
POOL_LAYERS = {"torchvision-conv1": (64, 55, 55), "torchvision-conv2": (192, 27, 27), "conv5": (256, 13, 13)}


def conv_layers(variant: str) -> dict[str, tuple[Conv, tuple[int, int, int]]]:
    """Each convolution of a variant with its input's channels, height and width, for pictures of the variant's size."""
    found = {}
    channels, side = VARIANTS[variant].in_channels, VARIANTS[variant].crop
    for number, conv in enumerate(VARIANTS[variant].convs, 1):
        found[f"{variant}-conv{number}"] = (conv, (channels, side, side))
        channels, side = conv.channels, (side + 2 * conv.padding - conv.kernel_size) // conv.stride + 1
        if conv.pool:
            side = (side - conv.pool) // conv.pool_stride + 1
    return found


def matrix(
    dtypes: Sequence[str], passes: Sequence[str] = ("forward", "backward", "both")
) -> Iterator[tuple[int, str, str]]:
    """(batch, dtype, pass): all at batch 128; at 1 and 1024 one half and one full precision, no lone backward."""
    full = "tf32" if "tf32" in dtypes else "fp32"
    for batch in (1, 128, 1024):
        for dtype in dtypes:
            for which in passes:
                if batch == 128 or (dtype in (full, "fp16") and which != "backward"):
                    yield batch, dtype, which

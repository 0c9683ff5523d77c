"""The ways to compute conv2d + bias + ReLU and its gradients on Triton's devices, for `fastalex.gpu.dispatch`.

Library means PyTorch's convolution (cuDNN on an NVIDIA GPU).  Every candidate takes tensors as they lie and gives its
output in `output_format`; what it has to copy for that belongs to its time.

All but cuDNN's own run on CPU tensors, too, in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalex import gpu
from fastalex.gpu import dispatch
from fastalex.gpu.dispatch import Candidate, Operation
from fastalex.kernels.geometry import fold_weight, memory_format, output_size, unfold_weight_grad

ALGORITHMS = ("batch_tiled", "descriptors", "spatial", "split_k")
Sizes = Sequence[int]


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where the input or the weight is, as torch's convolutions do."""
    if memory_format(weight) is torch.channels_last:
        return torch.channels_last
    return memory_format(input)


def describe(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> str:
    """The geometry in words, without the batch."""
    channels, height, width = input.shape[1:]
    features, _, rows, columns = weight.shape
    formats = (
        "channels_last" if found is torch.channels_last else "contiguous"
        for found in (memory_format(input), output_format(input, weight))
    )
    return (
        f"{channels}x{height}x{width} -> {features}, kernel {rows}x{columns}, stride {stride[0]}x{stride[1]}, "
        f"padding {padding[0]}x{padding[1]}, dilation {dilation[0]}x{dilation[1]}, groups {groups}, "
        f"{' to '.join(formats)}"
    )


def for_kernels(stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> tuple[Any, ...]:
    """The geometry of a convolution as the Triton launchers take it, with a padding for each side."""
    return tuple(stride), tuple((p, p) for p in padding), tuple(dilation), groups


def precision(input: Tensor) -> str:
    """How a kernel multiplies fp32: as torch.backends.cudnn allows the library to."""
    return dispatch.flags().precision if input.dtype == torch.float32 else "ieee"


def last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def always(*args: Any) -> None:
    return None


def no_channels_last(input: Tensor, weight: Tensor) -> str | None:
    if output_format(input, weight) is not torch.channels_last:
        return "takes channels_last, and neither the input nor the weight is"
    return None


# ------------------------------------------------------------------------------------------------ space to depth
class Blocks(NamedTuple):
    """How a strided convolution becomes one with stride 1 on blocks of pixels."""

    block: int
    padding: tuple[tuple[int, int], tuple[int, int]]  # in pixels, negative where the windows leave a rest over


def blocks_of(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> Blocks:
    out = output_size(input.shape[2:], weight.shape[2:], stride, padding)
    block = stride[0]
    after = ((out[i] - 1 + -(-weight.shape[2 + i] // block)) * block - input.shape[2 + i] - padding[i] for i in (0, 1))
    (top, left), (bottom, right) = padding, after
    return Blocks(block, ((top, bottom), (left, right)))


def no_space_to_depth(
    input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> str | None:
    block, channels = stride[0], input.shape[1]
    if block == 1 or block != stride[1] or block & (block - 1):
        return f"needs a stride that is a power of two above 1, the same in both directions, got {tuple(stride)}"
    if tuple(dilation) != (1, 1) or groups != 1:
        return f"needs dilation 1 and one group, got {tuple(dilation)} and {groups}"
    if block * channels > gpu.space_to_depth.MAX_ROW or block * block * channels * input.element_size() % 16:
        return (
            f"needs at most {gpu.space_to_depth.MAX_ROW} channels times stride and blocks of a multiple of 16 bytes, "
            f"got {channels} channels with stride {block}"
        )
    return no_channels_last(input, weight)


def to_blocks(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> Tensor:
    return gpu.space_to_depth.space_to_depth(input, *blocks_of(input, weight, stride, padding))


def is_image_layer(input: Tensor, stride: Sizes) -> bool:
    """Whether a layer is like conv1: at most 4 channels, strided.

    Eight 16-bit channels make a 16-byte load, so 3 channels cost a kernel single 2-byte loads; 4x4 blocks of them
    have 48 channels, for 312 KB instead of 301 KB per image and the copy that channels_last would cost anyway.
    """
    return input.shape[1] <= 4 and stride[0] > 1


# ------------------------------------------------------------------------------------------------------- forward
def bias_relu(sums: Tensor, bias: Tensor | None) -> Tensor:
    return gpu.bias_relu.bias_relu_(sums, bias)


def forward_library(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The library's convolution, then bias and ReLU in one pass over its output, in place."""
    return bias_relu(F.conv2d(input, weight, None, stride, padding, dilation, groups), bias)  # type: ignore[arg-type]


def forward_cudnn(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """cuDNN's own fusion.  Reported as 17 times slower than unfused for a first layer (pytorch#68506): only timed."""
    return torch.cudnn_convolution_relu(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]


def no_cudnn(input: Tensor, *rest: Any) -> str | None:
    if not input.is_cuda or torch.version.hip is not None or not hasattr(torch, "cudnn_convolution_relu"):
        return "needs cuDNN and an NVIDIA GPU"
    if dispatch.flags().deterministic:
        return "asks cuDNN for any algorithm, whatever torch.backends.cudnn.deterministic says"
    return None


def forward_triton(
    input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any, algorithm: str, config: Any = None
) -> Tensor:
    from fastalex.kernels.convolution.forward import conv_relu

    return conv_relu(
        last(input), last(weight), bias, *for_kernels(*geometry),
        algorithm=algorithm, precision=precision(input), config=config,
    )  # fmt: skip


def forward_configurations(
    input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any, algorithm: str
) -> list[str]:
    from fastalex.kernels.convolution.config import candidates, forward_config
    from fastalex.kernels.convolution.implicit_gemm import capability

    stride, padding, dilation, groups = geometry
    pixels = math.prod(output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation))
    return candidates(
        forward_config(
            algorithm, input.shape[0], pixels, tuple(weight.shape), groups, input.dtype, precision(input), capability()
        )
    )


def parsed(text: str) -> Any:
    """The kernels' Config of a text.  Raises ValueError for another text."""
    from fastalex.kernels.convolution.config import Config

    return Config.parse(text)


def no_algorithm(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any, algorithm: str) -> str | None:
    from fastalex.kernels.convolution.forward import unsupported

    return no_channels_last(input, weight) or unsupported(algorithm, input, weight, *for_kernels(*geometry))


def forward_blocks(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    *,
    behind: Candidate,
) -> Tensor:
    """Space to depth, then another candidate with stride 1."""
    blocks = to_blocks(input, weight, stride, padding)
    return behind.run(blocks, fold_weight(weight, stride[0]), bias, (1, 1), (0, 0), (1, 1), 1)


def no_forward_blocks(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> str | None:
    return no_space_to_depth(input, weight, *geometry)


def forward_behind(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> tuple[Any, ...]:
    """What `forward_blocks` gives the candidate behind, in shapes."""
    return *blocks_on_meta(input, weight, *geometry[:2]), bias, (1, 1), (0, 0), (1, 1), 1


def blocks_on_meta(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> tuple[Tensor, Tensor]:
    """The shapes of the blocks and of the folded weight."""
    block, ((top, bottom), (left, right)) = blocks_of(input, weight, stride, padding)
    batch, channels, height, width = input.shape
    shape = (batch, block * block * channels, (height + top + bottom) // block, (width + left + right) // block)
    folded = (weight.shape[0], shape[1], *(-(-k // block) for k in weight.shape[2:]))
    return tuple(  # type: ignore[return-value]
        torch.empty(s, dtype=input.dtype, device="meta", memory_format=torch.channels_last) for s in (shape, folded)
    )


# ----------------------------------------------------------------------------------------------------- gradients
def library_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    *,
    of_input: bool,
) -> Tensor:
    grads = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, [of_input, not of_input, False]
    )
    return grads[0 if of_input else 1]


def triton_input_grad(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool, config: Any = None
) -> Tensor:
    from fastalex.kernels.convolution.input_grad import conv_input_grad

    return conv_input_grad(
        last(grad), last(weight), tuple(input.shape[2:]), *for_kernels(*geometry),
        descriptors=descriptors, precision=precision(grad), config=config,
    )  # fmt: skip


def input_grad_configurations(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool
) -> list[str]:
    from fastalex.kernels.convolution.config import candidates, input_grad_config

    outputs = weight.shape[0] // geometry[-1]
    return candidates(
        input_grad_config(grad.shape[0], weight.shape[1], outputs, grad.dtype, descriptors, precision(grad))
    )


def no_triton_input_grad(grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool) -> str | None:
    from fastalex.kernels.convolution.input_grad import unsupported_input_grad

    return no_channels_last(input, weight) or unsupported_input_grad(
        grad, weight, *for_kernels(*geometry), descriptors=descriptors, precision=precision(grad)
    )


def triton_weight_grad(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool, config: Any = None
) -> Tensor:
    from fastalex.kernels.convolution.weight_grad import conv_weight_grad

    return conv_weight_grad(
        last(grad), last(input), tuple(weight.shape[2:]), *for_kernels(*geometry),
        descriptors=descriptors, precision=precision(grad), config=config,
    )  # fmt: skip


def weight_grad_configurations(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool
) -> list[str]:
    from fastalex.kernels.convolution.config import candidates, weight_grad_config

    taps, pixels, groups = math.prod(weight.shape[2:]), math.prod(grad.shape[2:]), geometry[-1]
    return candidates(
        weight_grad_config(
            grad.shape[0], weight.shape[1], weight.shape[0] // groups, taps, pixels, groups,
            grad.dtype, descriptors, precision(grad),
        )
    )  # fmt: skip


def no_triton_weight_grad(grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, descriptors: bool) -> str | None:
    from fastalex.kernels.convolution.weight_grad import unsupported_weight_grad

    return no_channels_last(input, weight) or unsupported_weight_grad(
        grad, input, tuple(weight.shape[2:]), *for_kernels(*geometry),
        descriptors=descriptors, precision=precision(grad),
    )  # fmt: skip


def weight_grad_blocks(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    *,
    behind: Candidate,
) -> Tensor:
    """Space to depth once more, then another candidate with stride 1.

    The forward pass does not keep its blocks: they would stay in memory to save this pass of 0.6 MB per image.
    """
    blocks = to_blocks(input, weight, stride, padding)
    _, folded = blocks_on_meta(input, weight, stride, padding)
    folded = torch.empty_like(folded, device=weight.device)  # only its shape matters
    found = behind.run(grad, blocks, folded, (1, 1), (0, 0), (1, 1), 1)
    return unfold_weight_grad(found, tuple(weight.shape[2:]), stride[0])  # type: ignore[arg-type]


def no_weight_grad_blocks(grad: Tensor, *args: Any) -> str | None:
    return no_space_to_depth(*args)


def weight_grad_behind(grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any) -> tuple[Any, ...]:
    """What `weight_grad_blocks` gives the candidate behind, in shapes."""
    return grad, *blocks_on_meta(input, weight, *geometry[:2]), (1, 1), (0, 0), (1, 1), 1


# ---------------------------------------------------------------------------------------------------- operations
def no_descriptors(tensor: Tensor, *rest: Any, otherwise: Callable[..., str | None]) -> str | None:
    """Below sm_90 the compiler turns descriptors into loads of single elements.  An emulator may run those."""
    if tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return "needs tensor descriptors in hardware (sm_90 or later)"
    return otherwise(tensor, *rest)


def _named(*candidates: Candidate) -> dict[str, Candidate]:
    return {
        candidate.name: replace(candidate, unsupported=partial(no_descriptors, otherwise=candidate.unsupported))
        if candidate.name.endswith("descriptors")
        else candidate
        for candidate in candidates
    }


def _triton(
    name: str,
    run: Callable[..., Tensor],
    unsupported: Callable[..., str | None],
    configurations: Callable[..., list[str]],
    **options: Any,
) -> Candidate:
    """A kernel of ours with these options, and with any configuration of its tiles."""
    return Candidate(
        name,
        partial(run, **options),
        partial(unsupported, **options),
        partial(configurations, **options),
        lambda text: partial(run, **options, config=parsed(text)),
    )


def _with_blocks(
    plain: Sequence[Candidate],
    run: Callable[..., Tensor],
    no_blocks: Callable[..., str | None],
    behind: Callable[..., tuple[Any, ...]],
) -> list[Candidate]:
    """The same candidates behind space to depth.

    All three take the operation's arguments.  no_blocks: why they cannot become blocks.  behind: what they become.
    """

    def unsupported(candidate: Candidate, *args: Any) -> str | None:
        return no_blocks(*args) or candidate.unsupported(*behind(*args))

    def configured(candidate: Candidate, text: str) -> Callable[..., Tensor]:
        assert candidate.configured is not None
        return partial(run, behind=replace(candidate, run=candidate.configured(text)))

    return [
        Candidate(
            "space_to_depth_" + candidate.name.removeprefix("triton_"),
            partial(run, behind=candidate),
            partial(unsupported, candidate),
            lambda *args, candidate=candidate: candidate.configurations(*behind(*args)),
            partial(configured, candidate) if candidate.configured else None,
        )
        for candidate in plain
    ]


_LIBRARY = Candidate("library", forward_library, always)
_TRITON = [
    _triton(f"triton_{algorithm}", forward_triton, no_algorithm, forward_configurations, algorithm=algorithm)
    for algorithm in ALGORITHMS
]
CONV2D_RELU = dispatch.register(
    Operation(
        "conv2d_relu",
        _named(
            _LIBRARY,
            Candidate("cudnn_convolution_relu", forward_cudnn, no_cudnn),
            *_TRITON,
            *_with_blocks([_LIBRARY, *_TRITON], forward_blocks, no_forward_blocks, forward_behind),
        ),
        lambda input, weight, bias, stride, *rest: (
            ["space_to_depth_library", "library"] if is_image_layer(input, stride) else ["library"]
        ),
        lambda input, weight, bias, *geometry: describe(input, weight, *geometry),
        "library",
    )
)


_INPUT_LIBRARY = Candidate("library", partial(library_gradient, of_input=True), always)
CONV2D_INPUT_GRAD = dispatch.register(
    Operation(
        "conv2d_input_grad",
        _named(
            _INPUT_LIBRARY,
            *(
                _triton(
                    name, triton_input_grad, no_triton_input_grad, input_grad_configurations, descriptors=descriptors
                )
                for name, descriptors in (("triton", False), ("triton_descriptors", True))
            ),
        ),
        lambda *args: ["library"],
        lambda grad, *args: describe(*args),
        "library",
    )
)

_WEIGHT_LIBRARY = Candidate("library", partial(library_gradient, of_input=False), always)
_WEIGHT_TRITON = [
    _triton(name, triton_weight_grad, no_triton_weight_grad, weight_grad_configurations, descriptors=descriptors)
    for name, descriptors in (("triton", False), ("triton_descriptors", True))
]
CONV2D_WEIGHT_GRAD = dispatch.register(
    Operation(
        "conv2d_weight_grad",
        _named(
            _WEIGHT_LIBRARY,
            *_WEIGHT_TRITON,
            *_with_blocks(
                [_WEIGHT_LIBRARY, *_WEIGHT_TRITON], weight_grad_blocks, no_weight_grad_blocks, weight_grad_behind
            ),
        ),
        lambda grad, input, weight, stride, *rest: (
            ["space_to_depth_library", "library"] if is_image_layer(input, stride) else ["library"]
        ),
        lambda grad, *args: describe(*args),
        "library",
    )
)


# ------------------------------------------------------------------------------------------- for the operators
def conv2d_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """relu(conv2d(...)) by the candidate that the dispatch chooses."""
    args = input, weight, bias, stride, padding, dilation, groups
    return dispatch.choose(CONV2D_RELU, *args).candidate.run(*args)


def gradients(
    grad: Tensor, input: Tensor, weight: Tensor, *geometry: Any, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of input and weight, None where `needs` says no."""
    args = grad, input, weight, *geometry
    return tuple(
        dispatch.choose(operation, *args).candidate.run(*args) if needed else None
        for operation, needed in zip((CONV2D_INPUT_GRAD, CONV2D_WEIGHT_GRAD), needs, strict=True)
    )

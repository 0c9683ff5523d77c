"""The operations as modules: arguments, parameter names, initialisation and `extra_repr` of the torch.nn modules.

A state_dict of the module that each one stands for loads unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from fastalex import functional as F
from fastalex.kernels.geometry import fold_weight
from fastalex.reference import IntOrPair, pair


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int] | str:
    """The padding (height, width) of a convolution in numbers; "same" where that pads one side more than the other."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return "same" if any(t % 2 for t in total) else pair([t // 2 for t in total])
    return pair(conv.padding)  # type: ignore[arg-type]


def convolution_of(conv: nn.Conv2d, input: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """Weight and (stride, padding, dilation, groups) with which `conv` takes this input.

    They are its own for (N, in_channels, H, W).  After `fastalex.kernels.space_to_depth.space_to_depth(images, stride,
    padding)` the input has in_channels * stride^2 channels and the padding inside: then the weight is folded, so that
    the gradient still arrives at `conv.weight`, and stride and padding are gone.
    """
    if (
        not is_traced(input)
        and takes_blocks(conv)
        and input.dim() == 4
        and input.shape[1] == conv.in_channels * conv.stride[0] ** 2
    ):
        return fold_weight(conv.weight, conv.stride[0]), (1, 0, 1, 1)
    return conv.weight, (conv.stride, conv.padding, conv.dilation, conv.groups)


def takes_blocks(conv: nn.Conv2d) -> bool:
    """Whether a convolution can take its input after space-to-depth."""
    return conv.stride[0] == conv.stride[1] > 1 and conv.dilation == (1, 1) and conv.groups == 1


def is_traced(input: Tensor) -> bool:
    """Whether torch.fx traces symbolically: shapes are not known then, and modules show themselves one by one."""
    return isinstance(input, fx.Proxy)


class ConvReLU2d(nn.Conv2d):
    """nn.Conv2d followed by nn.ReLU: (N, C, H, W) -> (N, K, OH, OW).  padding_mode must be "zeros".

    With a stride of 2 or more the input may also come after space-to-depth; see `convolution_of`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair | str = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
    ):
        if padding_mode != "zeros":
            raise ValueError(f'padding_mode must be "zeros", got {padding_mode!r}')
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            device=device,
            dtype=dtype,
        )
        self.padding = numeric_padding(self)

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        weight, geometry = convolution_of(self, input)
        return F.conv2d_relu(input, weight, self.bias, *geometry)


class LocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm, with `groups` to normalise inside each channel group: (N, C, ...) -> the same shape."""

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1):
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k, groups=self.groups)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", groups={self.groups}" if self.groups != 1 else "")


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d: (N, C, H, W) -> (N, C, OH, OW)."""

    def forward(self, input: Tensor) -> Any:  # as torch's: with return_indices a pair
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class LRNMaxPool2d(nn.Module):
    """nn.LocalResponseNorm followed by nn.MaxPool2d, fused: (N, C, H, W) -> (N, C, OH, OW).

    `after_relu` promises that the input is the output of a ReLU; see `fastalex.functional.lrn_max_pool2d`.
    """

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        kernel_size: IntOrPair = 3,
        stride: IntOrPair | None = 2,
        *,
        groups: int = 1,
        after_relu: bool = False,
    ):
        super().__init__()
        self.norm = F.ResponseNorm(size, alpha, beta, k, groups)
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.after_relu = after_relu

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        size, alpha, beta, k, groups = self.norm
        return F.lrn_max_pool2d(
            input, size, alpha, beta, k, self.kernel_size, self.stride, groups=groups, after_relu=self.after_relu
        )

    def extra_repr(self) -> str:
        size, alpha, beta, k, groups = self.norm
        text = f"{size}, alpha={alpha}, beta={beta}, k={k}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", groups={groups}" if groups != 1 else ""
        return text + (", after_relu=True" if self.after_relu else "")


class LinearReLUDropout(nn.Linear):
    """nn.Linear followed by nn.ReLU and nn.Dropout(p): (..., in_features) -> (..., out_features)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *, p: float = 0.5
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if not 0 <= p <= 1:
            raise ValueError(f"p, the dropout probability, must lie in [0, 1], got {p}")
        self.p = p

    if TYPE_CHECKING:

        def __call__(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu_dropout(input, self.weight, self.bias, self.p, self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"

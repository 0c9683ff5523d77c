"""What this package uses of PyTorch and PyTorch does not promise to keep, in one place.

tests/test_private.py fails where a PyTorch no longer has one of them, or it means something else.  Some are used
elsewhere: Dynamo's registry of backends (`fastalex.dynamo`), torch.library's operator objects (`fastalex.ops`), and of
torch's SGD what its subclass must know (`fastalex.optim`: `_init_group`, `_step_supports_amp_scaling`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map as tree_map


def functorch_is_active() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) surrounds the call."""
    return torch._C._are_functorch_transforms_active()


def a_mode_is_active() -> bool:
    """Whether a TorchDispatchMode wants to see every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def forward_mode_is_active() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return forward_ad._current_level >= 0


def is_written(tensor: Tensor) -> bool:
    """Whether somebody has written into the tensor since it was made."""
    return tensor._version > 0


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the module's tensors, forward or backward: at this one's or at every module's."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            every_module._global_forward_hooks,
            every_module._global_forward_pre_hooks,
            every_module._global_backward_hooks,
            every_module._global_backward_pre_hooks,
        )
    )


def has_onednn_linear() -> bool:
    """Whether this build of PyTorch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN, which reads weight and bias as packed memory, whatever their strides say."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this dtype on this processor."""
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return name is not None and hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()


def has_amx() -> bool:
    """Whether the processor multiplies tiles; False where this PyTorch does not say."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


def has_addmm_relu() -> bool:
    return hasattr(torch, "_addmm_activation")


def addmm_relu(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """relu(rows @ weight + bias), both in the product's epilogue on a GPU.  It has no derivative."""
    return torch._addmm_activation(bias, rows, weight)  # type: ignore[attr-defined]

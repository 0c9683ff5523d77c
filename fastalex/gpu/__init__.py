"""The operations on Triton's devices: the kernels, and what chooses between them and the library.

The kernels' modules are attributes of this package, `gpu.lrn` is `fastalex.kernels.lrn`, imported when they are first
asked for: Triton takes a while, and reads TRITON_INTERPRET then.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastalex.kernels import augment as augment
    from fastalex.kernels import bias_relu as bias_relu
    from fastalex.kernels import lpips as lpips
    from fastalex.kernels import lrn as lrn
    from fastalex.kernels import lrn_max_pool as lrn_max_pool
    from fastalex.kernels import lrn_max_pool_backward as lrn_max_pool_backward
    from fastalex.kernels import max_pool as max_pool
    from fastalex.kernels import partial_sums as partial_sums
    from fastalex.kernels import relu_bias_grad as relu_bias_grad
    from fastalex.kernels import sgd as sgd
    from fastalex.kernels import space_to_depth as space_to_depth

KERNELS = {
    "augment",
    "bias_relu",
    "lpips",
    "lrn",
    "lrn_max_pool",
    "lrn_max_pool_backward",
    "max_pool",
    "partial_sums",
    "relu_bias_grad",
    "sgd",
    "space_to_depth",
}


def __getattr__(name: str) -> ModuleType:
    if name not in KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"fastalex.kernels.{name}")
    globals()[name] = module
    return module

"""AlexNet as fast as the hardware allows: fused kernels as PyTorch operators, and the 2012 paper around them."""

from fastalex import backend, choices, dynamo, functional, nn, optim
from fastalex.alexnet import AlexNet
from fastalex.backend import HAS_TRITON
from fastalex.dynamo import explain, fuse
from fastalex.lpips.model import LPIPS
from fastalex.weights import alexnet

# the only place of the version; pyproject.toml reads it here
__version__ = "0.1.0"

__all__ = [
    "HAS_TRITON",
    "LPIPS",
    "AlexNet",
    "alexnet",
    "backend",
    "choices",
    "explain",
    "functional",
    "fuse",
    "nn",
    "optim",
]

dynamo.register()

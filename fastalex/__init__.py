"""AlexNet as fast as the hardware allows: fused kernels as PyTorch operators, and the 2012 paper around them."""

from fastalex import backend, functional, nn
from fastalex.alexnet import AlexNet, alexnet
from fastalex.backend import HAS_TRITON
from fastalex.convert import fuse, unfuse
from fastalex.lpips.model import LPIPS

__version__ = "0.1.0"

__all__ = ["HAS_TRITON", "LPIPS", "AlexNet", "alexnet", "backend", "functional", "fuse", "nn", "unfuse"]

"""What torch.hub offers of a checkout: `torch.hub.load("path/to/checkout", "alexnet", weights=..., source="local")`."""

from fastalex import LPIPS as lpips
from fastalex import alexnet

__all__ = ["alexnet", "dependencies", "lpips"]

dependencies = ["numpy", "torch"]

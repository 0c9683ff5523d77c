"""What torch.hub offers of a checkout: `torch.hub.load("path/to/checkout", "alexnet", weights=..., source="local")`."""

from fastalex import alexnet as alexnet

dependencies = ["numpy", "torch"]

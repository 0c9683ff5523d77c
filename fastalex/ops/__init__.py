"""The operators: schema, fake, autograd, and the choice between the Triton kernel and the CPU kernel."""

import importlib

from fastalex.late import after_import
from fastalex.ops.augment import augment, crops
from fastalex.ops.conv_relu import conv2d_relu
from fastalex.ops.conv_relu_pool import conv2d_relu_pool
from fastalex.ops.feature_distance import feature_distance
from fastalex.ops.linear import linear_relu_dropout
from fastalex.ops.lpips import lpips, lpips_features
from fastalex.ops.lrn import local_response_norm
from fastalex.ops.lrn_max_pool import lrn_max_pool2d
from fastalex.ops.max_pool import max_pool2d, max_pool2d_indices

# it imports Triton
after_import("torch.utils.flop_counter", lambda module: importlib.import_module("fastalex.ops.flops"))

__all__ = [
    "augment",
    "conv2d_relu",
    "conv2d_relu_pool",
    "crops",
    "feature_distance",
    "linear_relu_dropout",
    "local_response_norm",
    "lpips",
    "lpips_features",
    "lrn_max_pool2d",
    "max_pool2d",
    "max_pool2d_indices",
]

"""A user's script, as mypy --strict and pyright read it; tests/typing/test_typing.py has them do so, and runs it."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastalex
from fastalex import LPIPS, AlexNet, alexnet, backend, fuse
from fastalex import functional as F
from fastalex.nn import ConvReLU2d, LinearReLUDropout, LocalResponseNorm, LRNMaxPool2d
from fastalex.variants import VARIANTS, Conv, Variant, VariantName

small = Variant("small", (Conv(8, 3, pool=3, norm=F.ResponseNorm(5)),), crop=21, features_size=2, hidden=(4, 4))
images = torch.randn(2, 3, 21, 21)

# models
model = AlexNet(10, variant=small)
assert_type(model, AlexNet)
assert_type(model(images), Tensor)
assert_type(model.features_at(images, "relu1"), dict[str, Tensor])
assert_type(alexnet(None, variant=small, num_classes=10), AlexNet)
name: VariantName = "caffenet"
assert_type(VARIANTS[name], Variant)
if len(sys.argv) > 1:  # seconds, for nothing that a type checker would not see
    assert_type(AlexNet(variant=name)(images), Tensor)


class Mine(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


assert_type(fuse(Mine()), Mine)
assert_type(fuse(model), AlexNet)

# functions
x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(4, 8, 3, 3), torch.zeros(4)
assert_type(F.conv2d_relu(x, weight, bias, padding="same"), Tensor)
assert_type(F.local_response_norm(x, 5), Tensor)
assert_type(F.lrn_max_pool2d(x, 5, kernel_size=(3, 3)), Tensor)
assert_type(F.max_pool2d(x, 3, 2), Tensor)
assert_type(F.max_pool2d(x, 3, return_indices=False), Tensor)
assert_type(F.max_pool2d(x, 3, return_indices=True), tuple[Tensor, Tensor])
assert_type(F.max_pool2d(x, 3, 2, 0, 1, False, True), tuple[Tensor, Tensor])
wanted: bool = len(sys.argv) > 1
assert_type(F.max_pool2d(x, 3, return_indices=wanted), Tensor | tuple[Tensor, Tensor])

# modules
assert_type(ConvReLU2d(8, 4, 3)(x), Tensor)
assert_type(LocalResponseNorm(5)(x), Tensor)
assert_type(LRNMaxPool2d(5)(x), Tensor)
assert_type(LinearReLUDropout(9, 4, p=0.5)(x), Tensor)

# a perceptual loss
loss = LPIPS(pretrained=False, pnet_rand=True, net="alex")
a, b = torch.rand(2, 1, 3, 64, 64)
assert_type(loss(a, b, normalize=True), Tensor)
assert_type(loss(a, b, True), tuple[Tensor, list[Tensor]])
assert_type(loss.distance(a, loss.features(b)), Tensor)

# modes
assert_type(backend.current(), Literal["auto", "triton", "reference"])
with backend.use("reference"):
    assert_type(model(images), Tensor)

assert_type(fastalex.__version__, str)
assert_type(fastalex.HAS_TRITON, bool)

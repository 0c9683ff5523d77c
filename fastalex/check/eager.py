"""The same networks out of torch.nn's modules: what a model is compared with."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fastalex.alexnet import AlexNet
from fastalex.nn import LinearReLUDropout
from fastalex.variants import BatchNorm


def eager_twin(model: AlexNet) -> nn.Sequential:
    """The same network out of torch.nn's modules, with copies of parameters and buffers, on the same device.

    Raises ValueError for a variant with normalisation inside channel groups, which torch.nn has not got.
    """
    variant, dropout = model.variant, max(m.p for m in model.modules() if isinstance(m, nn.Dropout | LinearReLUDropout))
    if any(conv.lrn is not None and conv.lrn.groups != 1 for conv in variant.convs):
        raise ValueError(f"torch.nn has no normalisation inside channel groups, as variant {variant.name} needs")
    layers: list[nn.Module] = [nn.ZeroPad2d((0, variant.pad_end, 0, variant.pad_end))] if variant.pad_end else []
    channels = variant.in_channels
    example = next(model.parameters())
    with torch.device(example.device):
        for conv in variant.convs:
            layers.append(
                nn.Conv2d(channels, conv.channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups)
            )
            norm: list[nn.Module] = [nn.LocalResponseNorm(*conv.lrn[:4])] if conv.lrn else []
            if isinstance(conv.norm, BatchNorm):
                norm = [nn.BatchNorm2d(conv.channels, *conv.norm, affine=False)]
            pool = [nn.MaxPool2d(conv.pool, conv.pool_stride)] if conv.pool else []
            after = [*pool, *norm] if variant.pool_first else [*norm, *pool]
            relu = nn.ReLU(inplace=True)
            layers += [relu, *after] if variant.relu == "first" else [*after, relu]
            channels = conv.channels
        features = channels * variant.features_size**2
        sizes = (features, *variant.hidden, model.num_classes)
        layers.append(nn.Flatten())
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            drop = nn.Dropout(dropout)
            hidden = number < len(sizes) - 2
            before = [drop] if hidden and variant.dropout_first else []
            after_relu = [nn.ReLU(inplace=True), *([] if variant.dropout_first else [drop])] if hidden else []
            layers += [*before, nn.Linear(inputs, outputs), *after_relu]
    twin = nn.Sequential(*layers).to(example.dtype)
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for ours, theirs in zip(tensors(model), tensors(twin), strict=True):
            theirs.data.copy_(ours.data)
    return twin.to(memory_format=torch.channels_last)

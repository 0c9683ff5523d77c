"""What a layer of a model answers to a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalex.alexnet import AlexNet
from fastalex.nn import LRNMaxPool2d, MaxPool2d


def layer_names(model: AlexNet) -> dict[str, str]:
    """The modules that compute something, as Caffe calls them: {"conv1": "features.0", ...}.

    A convolution or fully connected layer includes its ReLU where the two are one module; "pool1" includes the
    normalisation before it where those two are.
    """
    names: dict[str, str] = {}
    number = 0
    for position, module in enumerate(model.features):
        if isinstance(module, nn.Conv2d):
            number += 1
            kind = "conv"
        elif isinstance(module, LRNMaxPool2d | MaxPool2d):
            kind = "pool"
        elif isinstance(module, nn.LocalResponseNorm | nn.BatchNorm2d):
            kind = "norm"
        elif isinstance(module, nn.ReLU):
            kind = "relu"
        else:
            continue
        names[f"{kind}{number}"] = f"features.{position}"
    linear = [i for i, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
    return names | {f"fc{number + i}": f"classifier.{place}" for i, place in enumerate(linear, 1)}


@torch.inference_mode()
def activations(model: AlexNet, inputs: Tensor, layer: str) -> Tensor:
    """The output of a layer: (N, K, H, W), or (N, units) of a fully connected one, on the CPU.

    layer: a name out of `layer_names`, or a module's path such as "features.0".
    Raises ValueError for another name.
    """
    names = layer_names(model)
    modules = dict(model.named_modules())
    path = names.get(layer, layer)
    if not path or path not in modules:
        raise ValueError(f"layer must be one of {', '.join(names)} or a module's path, got {layer!r}")
    found: list[Tensor] = []
    handle = modules[path].register_forward_hook(lambda module, arguments, output: found.append(output))
    try:
        model(inputs)
    finally:
        handle.remove()
    return found[0].float().cpu()


def hidden_features(model: AlexNet, inputs: Tensor) -> Tensor:
    """The last hidden layer, behind its ReLU: (N, C, H, W) -> (N, 4096) in the full-size variants."""
    return model.classifier[:-1](model.avgpool(model.features(inputs)).flatten(1))

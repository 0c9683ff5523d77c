"""What a recipe and a device make of a model before the first step."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.data.preprocessing import Preprocessing
from fastalex.parallel import one_weird_trick
from fastalex.training.options import Options
from fastalex.training.recipes import Recipe

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(recipe: Recipe, classes: int, device: torch.device | str) -> AlexNet:
    """The recipe's model with fresh weights, which are those of its seed, in channels_last."""
    torch.manual_seed(recipe.seed)
    model = AlexNet(classes, recipe.dropout, variant=recipe.variant)
    return model.to(device).to(memory_format=torch.channels_last)


def prepare(
    model: AlexNet, preprocessing: Preprocessing, recipe: Recipe, options: Options, device: torch.device
) -> nn.Module:
    """The model as training calls it: compiled, in CUDA graphs, spread over processes, or as it is.

    Raises ValueError for options that exclude each other.
    """
    forward: nn.Module = model
    graphs = recipe.cuda_graphs and device.type == "cuda"
    if graphs and recipe.batch_size % distributed.size():
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {distributed.size()}, for CUDA graphs, "
            f"got {recipe.batch_size}"
        )
    if options.parallel == "hybrid":
        if distributed.size() == 1:
            raise ValueError("parallel must be data for a single process, got hybrid")
        if options.compile or recipe.amp == "fp16":
            raise ValueError("parallel must be data with compile, and with amp fp16 (bf16 can be hybrid), got hybrid")
        return one_weird_trick(model, init_device_mesh(device.type, (distributed.size(),)))
    if options.compile:
        forward = cast(nn.Module, torch.compile(forward, mode="reduce-overhead" if graphs else None))
    elif graphs and options.accumulate == 1:  # a second replay would overwrite the first one's gradients
        crop, amp = preprocessing.crop, AMP_DTYPES[recipe.amp]
        shape = (recipe.batch_size // distributed.size(), preprocessing.channels, crop, crop)
        sample = torch.empty(shape, dtype=amp, device=device, memory_format=torch.channels_last).zero_()
        model.train()
        with torch.autocast(device.type, amp, enabled=amp is not None, cache_enabled=False):
            forward = cast(nn.Module, torch.cuda.make_graphed_callables(model, (sample,)))
    if distributed.size() > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    return forward

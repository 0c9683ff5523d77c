"""What a recipe and a device make of a model before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fastalex import distributed
from fastalex.alexnet import AlexNet
from fastalex.checkpoint import MODEL, describes_itself, load_model
from fastalex.data.preprocessing import Preprocessing
from fastalex.parallel import one_weird_trick
from fastalex.training.options import Options
from fastalex.training.recipes import Recipe
from fastalex.variants import Variant
from fastalex.weights import alexnet, head_of

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Initial(NamedTuple):
    """A model to start from, and what it expects of pictures.  classes: their names, None where nobody knows them."""

    weights: dict[str, Tensor]
    variant: Variant
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None

    def knows(self, classes: tuple[str, ...]) -> bool:
        """Whether the last layer is for these classes; where nothing has names, for as many."""
        if self.classes is None:
            return len(self.weights["classifier.6.weight"]) == len(classes)
        return self.classes == classes


def load_initial(weights: str) -> Initial:
    """What `fastalex.alexnet` loads, or a file or the folder of a run that `fastalex train` wrote.

    Raises as `fastalex.alexnet` and `fastalex.checkpoint.load_model`.
    """
    path = Path(weights) / MODEL if Path(weights).is_dir() else Path(weights)
    if describes_itself(path):
        model, card = load_model(path)
        return Initial(model.state_dict(), card.variant, card.preprocessing, card.classes)
    model = alexnet(path if Path(weights).exists() else weights)
    looks = Preprocessing.for_photos(model.variant.in_channels, model.variant.crop)
    return Initial(model.state_dict(), model.variant, looks, None)


def build_model(
    recipe: Recipe, classes: tuple[str, ...], device: torch.device | str, initial: Initial | None = None
) -> AlexNet:
    """The recipe's model in channels_last, with fresh weights, which are those of its seed, or with initial ones.

    The last layer stays fresh where the initial one is for other classes.  What the recipe freezes needs no gradient.
    """
    torch.manual_seed(recipe.seed)
    model = AlexNet(len(classes), recipe.dropout, variant=recipe.variant)
    if initial is not None:
        model.load_state_dict({**initial.weights, **({} if initial.knows(classes) else head_of(model))})
    if recipe.freeze != "nothing":
        model.features.requires_grad_(False)
    if recipe.freeze == "backbone":
        model.classifier[:-1].requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)


def train_mode(model: AlexNet, recipe: Recipe) -> None:
    """Training mode, but for frozen convolutions, whose running statistics would go on moving in it."""
    model.train()
    if recipe.freeze != "nothing":
        model.features.eval()


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
        if recipe.freeze != "nothing":
            raise ValueError(f"parallel must be data with freeze {recipe.freeze}, got hybrid")
        return one_weird_trick(model, init_device_mesh(device.type, (distributed.size(),)))
    if options.compile:
        forward = cast(nn.Module, torch.compile(forward, mode="reduce-overhead" if graphs else None))
    # of one process the whole step is a graph; of a second micro-batch a replay would overwrite the first's gradients
    elif graphs and options.accumulate == 1 and distributed.size() > 1:
        crop, amp = preprocessing.crop, AMP_DTYPES[recipe.amp]
        shape = (recipe.batch_size // distributed.size(), preprocessing.channels, crop, crop)
        sample = torch.empty(shape, dtype=amp, device=device, memory_format=torch.channels_last).zero_()
        train_mode(model, recipe)
        # the passes that warm up for the capture would leave running statistics of an empty sample
        kept = [buffer.clone() for buffer in model.buffers()]
        with torch.autocast(device.type, amp, enabled=amp is not None, cache_enabled=False):
            forward = cast(nn.Module, torch.cuda.make_graphed_callables(model, (sample,)))
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
    if distributed.size() > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    return forward

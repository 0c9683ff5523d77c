"""How often a classifier is right."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import distributed
from fastalex.data.augmentation import centre, cropped, moved, ten_corners
from fastalex.data.image_sets import ImageSet
from fastalex.data.preprocessing import Preprocessing
from fastalex.data.resident import held_on


class Scores(NamedTuple):
    """Mean cross-entropy in nats; the share of pictures whose class is the first, or among the first five, guesses."""

    loss: float
    top1: float
    top5: float


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k highest of its row: (N, classes), (N,) -> bool (N,)."""
    k = min(k, logits.shape[1])
    return (logits.topk(k).indices == labels[:, None]).any(1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    split: str = "test",
    batch_size: int = 250,
    ten_crop: bool = False,
    confusion: Tensor | None = None,
) -> Scores:
    """Scores of the model on a split, one centre crop a picture or ten; leaves the model in evaluation mode.

    Several processes share the pictures, and all of them return the scores of the whole.

    batch_size: images per call of the model and process; of ten crops a tenth as many pictures.
    confusion: int64 (classes, classes), zeros at first: how often [a class] was taken for [another].
    """
    model.eval()
    device = next(model.parameters()).device
    count, size = data.count(split), distributed.size()
    pictures = max(1, batch_size // 10) if ten_crop else batch_size
    # each process takes neighbours: they are what it holds of a set in shares
    batches = distributed.dealt(torch.arange(count), size, pictures * size).split(pictures * size)
    mine = [distributed.equal_shares(batch, size)[distributed.rank()] for batch in batches]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    held = held_on(data, split, device)
    loaded = iter(data.batches(split, [] if held is not None else [indices for indices, _ in mine]))
    for indices, counting in mine:
        slots = None
        if held is not None:
            slots = held.slots_of(moved(held.nearest(indices), device))
            images, labels = held.images, held.labels[slots]
        else:
            images, labels = (tensor.to(device) for tensor in next(loaded))
        labels = labels[:counting]
        if ten_crop:
            mean = ten_crop_probabilities(model, images, data.preprocessing, slots=slots)[:counting]
            scores = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        else:
            corners = centre(images.shape, data.preprocessing.crop)
            inputs = cropped(images, corners, data.preprocessing, slots=slots)
            scores = model(inputs).float()[:counting].log_softmax(1)
        sums[0] += F.nll_loss(scores, labels, reduction="sum")
        sums[1] += in_top(scores, labels, 1).sum()
        sums[2] += in_top(scores, labels, 5).sum()
        if confusion is not None:
            cells = labels * len(confusion) + scores.argmax(1)
            confusion += torch.bincount(cells, minlength=confusion.numel()).view_as(confusion).to(confusion.device)
    if confusion is not None:
        distributed.sum_over_processes(confusion)
    return Scores(*(distributed.sum_over_processes(sums) / count).tolist())


@torch.inference_mode()
def ten_crop_probabilities(
    model: nn.Module, images: Tensor, preprocessing: Preprocessing, *, slots: Tensor | None = None
) -> Tensor:
    """Class probabilities averaged over ten crops of each image, all in one call of the model.

    The four corners, the centre, and their mirror images (Krizhevsky et al. 2012, section 4.1, who average the
    softmax, not the logits).  images: uint8 (N, C, H, W), at least `preprocessing.crop` high and wide, on the model's
    device; slots: those of a set that are meant, as in `augment`.  Returns float32 (N, classes).
    """
    crops = cropped(images, ten_corners(images.shape, preprocessing.crop), preprocessing, slots=slots)
    return model(crops).float().softmax(1).unflatten(0, (10, -1)).mean(0)

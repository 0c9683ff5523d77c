"""How often a classifier is right."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex import distributed
from fastalex.data.image_sets import ImageSet


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
def evaluate(model: nn.Module, data: ImageSet, *, split: str = "test", batch_size: int = 250) -> Scores:
    """Scores of the model on a split, one centre crop a picture; leaves the model in evaluation mode.

    Several processes share the pictures, and all of them return the scores of the whole.
    """
    model.eval()
    device = next(model.parameters()).device
    count = data.count(split)
    mine = torch.arange(count).split(batch_size)[distributed.rank() :: distributed.size()]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in data.batches(split, mine):
        labels = labels.to(device)
        logits = model(data.preprocessing.for_evaluation(images.to(device))).float()
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += in_top(logits, labels, 1).sum()
        sums[2] += in_top(logits, labels, 5).sum()
    return Scores(*(distributed.sum_over_processes(sums) / count).tolist())

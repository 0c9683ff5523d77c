"""What a classifier gets right and what it confuses, class by class."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastalex.evaluation.metrics import Scores


class ClassScores(NamedTuple):
    """One class.  recall: the share of its pictures that were recognised; precision: the share of the pictures taken
    for it that were; None where there are no such pictures.  taken_for: the class that most of the others were taken
    for, and how often."""

    name: str
    pictures: int
    recall: float | None
    precision: float | None
    taken_for: tuple[str, int] | None


def per_class(confusion: Tensor, classes: tuple[str, ...]) -> list[ClassScores]:
    """The rows of a confusion matrix, int64 (classes, classes), [true, predicted]."""
    right = confusion.diagonal().tolist()
    pictures, predicted = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    most, where = wrong.max(1)
    return [
        ClassScores(
            name,
            pictures[i],
            right[i] / pictures[i] if pictures[i] else None,
            right[i] / predicted[i] if predicted[i] else None,
            (classes[int(where[i])], int(most[i])) if most[i] else None,
        )
        for i, name in enumerate(classes)
    ]


def as_json(scores: Scores, confusion: Tensor, classes: tuple[str, ...], **about: Any) -> dict[str, Any]:
    """Everything, for a file; `about` says what was evaluated."""
    return {
        **about,
        "pictures": int(confusion.sum()),
        **scores._asdict(),
        "per_class": [row._asdict() for row in per_class(confusion, classes)],
        "confusion": confusion.tolist(),
    }

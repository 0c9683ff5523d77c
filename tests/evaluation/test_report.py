"""Scores, the confusion matrix and the table of classes, on numbers small enough to count by hand."""

import json

import pytest
import torch
from small_runs import Pictures

from fastalex.evaluation.metrics import evaluate, ten_crop_probabilities
from fastalex.evaluation.report import ClassScores, as_json, per_class

CLASSES = ("cat", "dog", "bird", "fish")
CONFUSION = torch.tensor([[6, 2, 0, 0], [1, 9, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])


class Brightest(torch.nn.Module):
    """Takes the colour for the class, and stumbles over the third."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        colours = x.mean((2, 3)) * self.scale
        return torch.cat([colours[:, :2], colours[:, 2:] - 5, torch.zeros(len(x), 1)], 1)


def test_classes():
    assert per_class(CONFUSION, CLASSES) == [
        ClassScores("cat", 8, 0.75, 0.6, ("dog", 2)),
        ClassScores("dog", 10, 0.9, 0.75, ("cat", 1)),
        ClassScores("bird", 4, 0.0, None, ("cat", 3)),
        ClassScores("fish", 0, None, None, None),
    ]
    assert CONFUSION[0, 0] == 6  # and left as it was


@pytest.mark.parametrize("ten_crop", [False, True])
@pytest.mark.parametrize("batch_size", [7, 30, 1000])
def test_scores_and_confusion_against_counting(batch_size, ten_crop):
    pytest.importorskip("torchvision")
    data, model = Pictures(), Brightest()
    ((images, labels),) = data.batches("test", [torch.arange(30)])
    with torch.no_grad():
        if ten_crop:
            shares = ten_crop_probabilities(model, images, data.preprocessing)
        else:
            shares = model(data.preprocessing.for_evaluation(images)).softmax(1)
    model.sizes.clear()
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    scores = evaluate(model, data, batch_size=batch_size, ten_crop=ten_crop, confusion=confusion)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for label, row in zip(labels, shares, strict=True):
        expected[label, row.argmax()] += 1
    assert torch.equal(confusion, expected)
    assert scores.top1 == pytest.approx(expected.diagonal().sum().item() / 30)
    assert 0.5 < scores.top1 < 1
    assert scores.top5 == 1
    assert scores.loss == pytest.approx(-shares[range(30), labels].log().mean().item(), rel=1e-5)
    # ten crops of few pictures take as much memory as one of many
    assert max(model.sizes) <= max(batch_size, 10)


def test_a_probability_of_zero_costs_much_but_not_everything():
    pytest.importorskip("torchvision")
    model = Brightest()
    model.scale.data.fill_(1e6)
    scores = evaluate(model, Pictures(), ten_crop=True)
    assert 10 < scores.loss < 100


def test_json():
    from fastalex.evaluation.metrics import Scores

    report = json.loads(json.dumps(as_json(Scores(0.5, 0.7, 0.9), CONFUSION, CLASSES, weights="w", crops="ten")))
    assert (report["pictures"], report["top1"], report["crops"]) == (22, 0.7, "ten")
    assert report["per_class"][2] == {
        "name": "bird",
        "pictures": 4,
        "recall": 0.0,
        "precision": None,
        "taken_for": ["cat", 3],
    }
    assert report["confusion"] == CONFUSION.tolist()


def test_drawn_and_printed(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from fastalex.visualize import console, figures

    figures.confusion_matrix(CONFUSION, CLASSES, tmp_path / "few.png")
    many = torch.randint(3, (200, 200), generator=torch.Generator().manual_seed(0)) + 50 * torch.eye(
        200, dtype=torch.int64
    )
    figures.confusion_matrix(many, [f"c{i}" for i in range(200)], tmp_path / "many.png")
    for name in ("few.png", "many.png"):
        assert image.open(tmp_path / name).size[1] > 300
    console.print_classes(CONFUSION, CLASSES)
    text = capsys.readouterr().out
    assert "cat (3)" in text
    assert text.index("bird") < text.index("dog")  # the worst first
    assert "fish" not in text  # no pictures, nothing to say
    console.print_classes(many, tuple(f"c{i}" for i in range(200)))
    text = capsys.readouterr().out
    assert "the 20 worst of 200 classes" in text

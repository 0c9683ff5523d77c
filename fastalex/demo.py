"""The demonstration: train a small AlexNet on real pictures, then look at what it learnt.

Fashion-MNIST at 64x64 and every stage of the 2012 network; `fastalex demo` on the command line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastalex.checkpoint import DEMO_MODEL
from fastalex.data.image_sets import FashionMNIST
from fastalex.evaluation.metrics import evaluate
from fastalex.training.loop import train
from fastalex.training.prepare import build_model
from fastalex.training.recipes import DEMO_RECIPE
from fastalex.visualize import figures
from fastalex.visualize.console import ProgressBar, console, print_predictions, print_scores

FOLDER = DEMO_MODEL.parent
PRINTED, SHOWN, STRIDE = 10, 24, 107


def run(folder: Path = FOLDER, epochs: int = DEMO_RECIPE.epochs, device: torch.device | str = "cpu") -> float:
    """Train, classify, print and draw; everything goes to `folder`.  Returns the test accuracy."""
    recipe = replace(DEMO_RECIPE, epochs=epochs)
    data = FashionMNIST(FashionMNIST.preprocessing_for(recipe.variant.in_channels, recipe.variant.crop))
    model = build_model(recipe, data.classes, device)
    console.print(
        f"AlexNet with {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{data.count('train'):,} training and {data.count('test'):,} test pictures of {len(data.classes)} classes"
    )
    with ProgressBar(epochs, data.count("train")) as callback:
        history = train(model, data, recipe, folder, callback=callback)

    scores = evaluate(model, data)
    # the test pictures are sorted by class, 100 of each: this stride visits the classes in turn
    chosen = torch.arange(SHOWN) * STRIDE % data.count("test")
    images, labels = next(data.batches("test", [chosen]))
    with torch.inference_mode():
        inputs = data.preprocessing.for_evaluation(images).to(device)
        probabilities = model(inputs).softmax(1).cpu()
    print_predictions([data.classes[label] for label in labels[:PRINTED]], probabilities[:PRINTED], data.classes)
    figures.learning_curve(history, folder / "learning_curve.png")
    figures.filters(next(model.features.parameters()), folder / "filters.png")
    figures.contact_sheet(images, labels.tolist(), probabilities, data.classes, folder / "predictions.png")

    console.print(
        f"trained for {sum(line['seconds'] for line in history):.0f} s; on {data.count('test'):,} unseen pictures:"
    )
    print_scores(scores, data.count("test"))
    console.print(f"look into {folder}: " + ", ".join(sorted(file.name for file in folder.iterdir())), soft_wrap=True)
    return scores.top1

"""Make docs/gallery.md and its pictures: run the commands that it shows, then shrink what they drew.

    python docs/make_gallery.py

Trains the demonstration's model first if runs/demo has none; experiments that were done before are not done again.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastalex import cli
from fastalex.data import fashion_mnist
from fastalex.evaluation.inputs import SAMPLE_SHOWN
from fastalex.files import replacing, write_whole

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/gallery")
WIDTH, COLOURS = 800, 256
SHOWN = dict(zip(("coat", "sandal", "bag", "ankle-boot"), SAMPLE_SHOWN, strict=True))


class Shot(NamedTuple):
    """`picture` is drawn by `command`; `table`, if any, is a file with a Markdown table that goes below it."""

    title: str
    text: str
    command: str
    picture: Path
    table: Path | None = None


PICTURES = " ".join(f"{RUNS}/{name}.png" for name in SHOWN)
PREDICTED = RUNS / "predictions.json"
SHOTS = (
    Shot(
        "What is on a picture",
        "Pictures that the model has not seen, with its five likeliest classes, as in the paper's figure 4. {verdict} "
        "`--weights IMAGENET1K_V1` takes torchvision's weights, which know ImageNet's 1,000 classes.",
        f"predict {PICTURES} --out {RUNS}/predictions.png --json {PREDICTED}",
        RUNS / "predictions.png",
    ),
    Shot(
        "What the first convolution looks for",
        "Its filters; the paper's figure 3 shows the 96 of the full-size network, learnt from ImageNet.",
        f"visualize filters --out {RUNS}",
        RUNS / "filters.png",
    ),
    Shot(
        "What a layer answers",
        "Every map of the first convolution for one picture; `--layer` takes any other by name. The command writes a "
        "page that opens offline too.",
        f"visualize activations {RUNS}/ankle-boot.png --out {RUNS}",
        RUNS / "activations-conv1-ankle-boot.png",
    ),
    Shot(
        "Pictures that the model takes for similar",
        "Nearest neighbours by Euclidean distance in the last hidden layer, as in section 6.1 of the paper, among the "
        "1,000 test pictures; `--data` takes a folder or a packed set.",
        f"visualize similar --out {RUNS}",
        RUNS / "similar.png",
    ),
    Shot(
        "Where parameters, arithmetic and memory are",
        "The variant `paper`, layer by layer: most arithmetic is in the convolutions, most parameters are in fc6, and "
        "most of what training keeps in memory is around the normalisation, where fused operators keep a fraction.",
        f"describe --chart {RUNS}/layers.png",
        RUNS / "layers.png",
    ),
    Shot(
        "ReLU against tanh",
        "The paper's figure 1 on a small scale, where it shows nothing: both units learn this easy set within a "
        "hundred steps, and harder thresholds do not part them either (one seed at rate 0.03: ReLU took 600 steps to "
        "5 % and 950 to 2 %, tanh 650 and 900). Nor do colours: on 5,000 patches of 32x32 out of ten pictures of "
        "scikit-image's, which of them a patch is from took ReLU 210 steps to 25 % and tanh 120. With `--data` and the "
        "files of CIFAR-10 set and threshold are the paper's.",
        f"experiment relu-vs-tanh --out {RUNS}/relu-vs-tanh",
        RUNS / "relu-vs-tanh" / "figure.png",
        RUNS / "relu-vs-tanh" / "table.md",
    ),
    Shot(
        "What each ingredient is worth",
        "One thing taken away at a time from a narrow network with a small budget. The paper's gains are those of "
        "large networks on ILSVRC-2010 after 90 epochs. In five epochs a network has not begun to overfit, so "
        "regularisers cost accuracy here; the other gains, if there are any, are smaller than what seeds differ by.",
        f"experiment ablation --out {RUNS}/ablation",
        RUNS / "ablation" / "figure.png",
        RUNS / "ablation" / "table.md",
    ),
)


def shrink(source: Path, target: Path) -> None:
    """At most WIDTH pixels wide, in COLOURS colours: tens of kilobytes."""
    with Image.open(source) as picture:
        small = picture.convert("RGB")
    if small.width > WIDTH:
        small = small.resize((WIDTH, round(small.height * WIDTH / small.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_bytes(buffer.getvalue())


def verdict() -> str:
    """Which of the pictures the model is wrong about."""
    wrong = []
    for found in json.loads(PREDICTED.read_text())["pictures"]:
        name, guess = Path(found["picture"]).stem.replace("-", " "), found["classes"][0]["class"]
        if guess.lower() != name:
            wrong.append(f"the {name}, which it takes for: {guess}")
    return f"It is wrong about {'; and about '.join(wrong)}." if wrong else "It is right about all of them."


def main() -> None:
    if not cli.DEMO_MODEL.is_file():
        cli.main(["demo"])
    RUNS.mkdir(parents=True, exist_ok=True)
    clothes = fashion_mnist.load("test").images
    for name, place in SHOWN.items():
        Image.fromarray(clothes[place]).resize((256, 256), Image.Resampling.BICUBIC).save(RUNS / f"{name}.png")
    lines = [
        "# Gallery",
        "",
        "Made by `make gallery`, all of it on a CPU, with the model that `make demo` trains on Fashion-MNIST.",
    ]
    for shot in SHOTS:
        print(f"fastalex {shot.command}", flush=True)
        cli.main(shot.command.split())
        name = f"{shot.command.split()[0]}-{shot.picture.parent.name}-{shot.picture.stem}".replace("-gallery-", "-")
        shrink(shot.picture, ROOT / "docs" / "gallery" / f"{name}.png")
        lines += [
            "",
            f"## {shot.title}",
            "",
            shot.text.replace("{verdict}", verdict()),
            "",
            f"![{shot.title}](gallery/{name}.png)",
            "",
        ]
        if shot.table is not None:
            lines += [shot.table.read_text().rstrip(), ""]
        lines += ["```sh", f"fastalex {shot.command}", "```"]
    write_whole(ROOT / "docs" / "gallery.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("usage: python docs/make_gallery.py")
    main()

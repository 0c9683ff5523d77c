"""A folder of photographs as a person has it, 6 classes of 24: JPEG files cut out of those that scikit-image ships.

Each photograph is a class and is cut into 4 x 6 pieces, one a file, with a brightness of its own.  The pieces do not
overlap, so none has anything in common with one that is held out, however the files are split.
"""

import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageEnhance

CLASSES = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "grass": "grass.png",
    "motorcycle": "motorcycle_left.png",
    "tissue": "ihc.png",
}
OTHERS = {"brick": "brick.png", "gravel": "gravel.png", "retina": "retina.jpg", "rocket": "rocket.jpg"}
ROWS, COLUMNS = 4, 6


def folder_of(root, classes=CLASSES, per_class=ROWS * COLUMNS):
    """Writes root/CLASS/00.jpg, ...; returns root."""
    source = Path(find_spec("skimage").submodule_search_locations[0]) / "data"
    draw = random.Random(0)
    for name, file in classes.items():
        photograph = Image.open(source / file).convert("RGB")
        width, height = photograph.width // COLUMNS, photograph.height // ROWS
        places = [(column * width, row * height) for row in range(ROWS) for column in range(COLUMNS)]
        (root / name).mkdir(parents=True)
        for i, (left, top) in enumerate(places[:per_class]):
            piece = photograph.crop((left, top, left + width, top + height))
            piece = ImageEnhance.Brightness(piece).enhance(draw.uniform(0.6, 1.4))
            piece.save(root / name / f"{i:02}.jpg", quality=90)
    return root

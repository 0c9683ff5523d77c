"""A model together with what is needed to use it on picture files."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from fastalex.alexnet import AlexNet
from fastalex.checkpoint import DEMO_MODEL, ModelCard, load_model
from fastalex.data.decode import in_8_bits
from fastalex.data.preprocessing import Preprocessing, centre_crop
from fastalex.evaluation.metrics import ten_crop_probabilities
from fastalex.weights import TORCHVISION_WEIGHTS, alexnet
from fastalex.words import counted

IMAGENET_CLASSES = 1000
# Half a gigabyte in memory; below Pillow's own limit of 179 million, where it warns already above 89 million
MAX_PIXELS = 85_000_000
MAX_ASPECT = 50


def load_classifier(weights: str, classes: tuple[str, ...] = ()) -> tuple[AlexNet, ModelCard]:
    """The model behind a file that `fastalex train` wrote, any other file that `fastalex.alexnet` reads, or the name of
    torchvision's published weights.

    classes: names, for a file that has none; by default ImageNet's, whose order is Caffe's and torchvision's too.
    Raises FileNotFoundError, or ValueError for a file that does not say what its classes are called.
    """
    if weights == str(DEMO_MODEL) and not DEMO_MODEL.is_file():
        raise FileNotFoundError(
            f"no {DEMO_MODEL} yet: run `fastalex demo` first, which trains that model in minutes, or name weights: a "
            f"file, or --weights {next(iter(TORCHVISION_WEIGHTS))} for torchvision's, which know ImageNet's "
            f"{IMAGENET_CLASSES:,} classes"
        )
    if weights.endswith(".safetensors") and not classes:
        return load_model(Path(weights))
    model = alexnet(weights)
    looks = Preprocessing.for_photos(3, model.variant.crop)
    if classes:
        if len(classes) != model.num_classes:
            raise ValueError(
                f"{weights} has {counted(model.num_classes, 'class', 'classes')}, {len(classes)} names were given"
            )
        return model.eval(), ModelCard(model.variant, classes, looks)
    if model.num_classes != IMAGENET_CLASSES:
        raise ValueError(
            f"{weights} has {counted(model.num_classes, 'class', 'classes')} and no names for them; "
            f"only files that `fastalex train` wrote and ImageNet's {IMAGENET_CLASSES} classes can be used here"
        )
    from torchvision.models import AlexNet_Weights

    names = tuple(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
    return model.eval(), ModelCard(model.variant, names, looks)


def check_classes(card: ModelCard, classes: tuple[str, ...]) -> None:
    """Raises ValueError if pictures of these classes cannot be used to measure the model.

    ImageNet's folders are called by WordNet numbers ("n01440764"), whose order is that of its 1,000 published names.
    """
    numbers = all(re.fullmatch(r"n\d{8}", name) for name in classes)
    if card.classes == classes or (numbers and len(classes) == len(card.classes) == IMAGENET_CLASSES):
        return
    raise ValueError(
        f"the model knows {counted(len(card.classes), 'class', 'classes')} ({card.classes[0]}, ...), "
        f"the pictures have {len(classes)} ({classes[0]}, ...): they must be the same"
    )


def read_picture(path: Path, preprocessing: Preprocessing) -> Tensor:
    """An image file, upright, in the model's colours and size, not yet normalised: uint8 (C, resize.., resize..).

    Raises what `open_picture` does.
    """
    return prepared(open_picture(path, "L" if preprocessing.channels == 1 else "RGB"), preprocessing)


def prepared(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An image in the model's mode, in its size: uint8 (C, resize.., resize..)."""
    return transforms.pil_to_tensor(transforms.resize(image, [preprocessing.resize]))


def open_picture(path: Path, mode: str) -> Image.Image:
    """An image file, upright, in Pillow's mode "L" or "RGB".

    Raises FileNotFoundError, or ValueError as `picture_in`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return picture_in(path, str(path), mode)


def picture_in(content: Path | bytes, name: str, mode: str) -> Image.Image:
    """An encoded picture, upright, in Pillow's mode "L" or "RGB"; errors call it `name`.

    Raises ValueError for what is no image, one of more than MAX_PIXELS, and one whose long side is more than MAX_ASPECT
    times its short side; both would take gigabytes, the second after resizing.
    """
    refusal = ""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                refusal = f"has {width}x{height} pixels, more than {MAX_PIXELS:,}: make it smaller first"
            elif max(width, height) > MAX_ASPECT * min(width, height):
                refusal = f"has {width}x{height} pixels: one side is over {MAX_ASPECT} times the other"
            else:
                return in_8_bits(ImageOps.exif_transpose(file)).convert(mode)
    except Image.DecompressionBombError:
        refusal = f"has more than {MAX_PIXELS:,} pixels: make it smaller first"
    except UnidentifiedImageError:
        refusal = "is not an image that can be read (no format that Pillow knows)"
    except Exception as error:  # whatever a decoder trips over in foreign bytes
        refusal = f"is not an image that can be read ({error or type(error).__name__})"
    raise ValueError(f"{name} {refusal}")


@torch.inference_mode()
def classify(model: AlexNet, pictures: list[Tensor], preprocessing: Preprocessing, *, ten_crop: bool = False) -> Tensor:
    """Class probabilities (N, classes) of pictures that `read_picture` returned: of the centre, or of ten crops."""
    device = next(model.parameters()).device
    if ten_crop:
        squares = torch.cat([centre_crop(picture[None].to(device), preprocessing.resize) for picture in pictures])
        return ten_crop_probabilities(model, squares, preprocessing).cpu()
    inputs = torch.cat([preprocessing.for_evaluation(picture[None].to(device)) for picture in pictures])
    return model(inputs).float().softmax(1).cpu()

"""Sizes, counts and orders of what is drawn; pixels only where they are data."""

import io
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from PIL import Image

from fastalex.visualize import figures
from fastalex.visualize.page import Section, Tile, write_page


class Outline(HTMLParser):
    """Tags opened and closed, sources of everything that a browser would load, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.others, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.images.append(found)
        self.others += [value for name, value in attributes if name in ("src", "href") and tag != "img"]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_stretch():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert figures.stretch(maps).tolist() == [[[0, 255], [128, 0]], [[0, 0], [0, 0]]]


def test_coloured_brightens_with_the_value():
    colours = figures.coloured(torch.arange(256.0).view(1, 1, 256)).float()
    assert colours.shape == (1, 3, 1, 256)
    assert (colours.mean((0, 1, 2)).diff() >= 0).float().mean() > 0.95


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(96, 16, (3, 71, 191)), (5, 8, (3, 11, 95)), (1, 1, (3, 11, 11))]
)
def test_mosaic(count, columns, shape):
    tiles = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 11, 11)
    sheet = figures.mosaic(tiles, columns)
    assert sheet.shape == shape
    for i in range(count):
        row, column = divmod(i, columns)
        assert (sheet[:, 12 * row : 12 * row + 11, 12 * column : 12 * column + 11] == i).all()
    if columns > 1:
        assert (sheet[:, :, 11] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_filters(channels, tmp_path):
    weight = torch.randn(96, channels, 11, 11)
    tiles = figures.filter_tiles(weight)
    assert tiles.shape == (96, channels, 11, 11)
    assert (tiles.flatten(1).amin(1) == 0).all()
    assert (tiles.flatten(1).amax(1) == 255).all()
    figures.filters(weight, tmp_path / "filters.png")
    with Image.open(tmp_path / "filters.png") as drawn:
        assert drawn.width > 2 * drawn.height  # 16 columns, 6 rows


def test_predictions_of_pictures_of_any_size(tmp_path):
    pictures = [torch.randint(256, size, dtype=torch.uint8) for size in ((3, 256, 400), (3, 600, 256), (3, 256, 256))]
    shares = torch.rand(3, 7).softmax(1)
    figures.predictions(pictures, ["a", "b" * 60, "c"], shares, ["a class"] * 7, tmp_path / "new" / "three.png", 9)
    figures.predictions(pictures[:1], ["a"], shares[:1], ["a class"] * 7, tmp_path / "one.png")
    with Image.open(tmp_path / "new" / "three.png") as three, Image.open(tmp_path / "one.png") as one:
        assert three.width == 2 * one.width
    assert not list(tmp_path.rglob(".*"))  # nothing half-written


@pytest.mark.parametrize(("text", "expected"), [("short", "short"), ("a/very/long/path.jpg", "...path.jpg")])
def test_shortened_keeps_the_end(text, expected):
    assert figures.shortened(text, 11) == expected


def test_page_holds_everything(tmp_path):
    pictures = torch.randint(256, (3, 3, 5, 9), dtype=torch.uint8)
    tiles = [Tile(picture, f'<script> & "{i}"') for i, picture in enumerate(pictures)]
    grey = [Tile(pictures[0, :1], "grey")]
    write_page(
        tmp_path / "page.html", "<Title>", "note", [Section("<b>", "&", tiles, 90), Section("two", "", grey, 50, True)]
    )
    found = Outline((tmp_path / "page.html").read_text())
    assert found.open == []
    assert found.others == []  # nothing to load
    assert "<Title>" in found.text
    assert "<script>" in found.text  # as text
    assert [image["width"] for image in found.images] == ["90"] * 3 + ["50"]
    assert all(image["alt"] for image in found.images)
    for image, picture in zip(found.images, [*pictures, pictures[0, :1]], strict=True):
        kind, _, content = image["src"].partition("base64,")
        assert kind == "data:image/png;"
        with Image.open(io.BytesIO(b64decode(content))) as stored:
            pixels = torch.from_numpy(np.array(stored)).view(5, 9, -1)
        assert torch.equal(pixels.permute(2, 0, 1), picture)

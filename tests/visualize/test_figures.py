"""Sizes, counts and orders of what is drawn; pixels only where they are data."""

import io
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from matplotlib.figure import Figure
from PIL import Image

from fastalex.visualize import figures
from fastalex.visualize.page import Section, Tile, write_page


class Outline(HTMLParser):
    """Tags opened and closed, sources of everything that a browser would load, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.others, self.links, self.names, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.images.append(found)
        if "id" in found:
            self.names.append(found["id"])
        if tag == "a" and found["href"].startswith("#"):
            self.links.append(found["href"][1:])
        else:
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


def test_filter_tiles_of_colours_are_stretched():
    tiles = figures.filter_tiles(torch.randn(96, 3, 11, 11))
    assert tiles.shape == (96, 3, 11, 11)
    assert (tiles.flatten(1).amin(1) == 0).all()
    assert (tiles.flatten(1).amax(1) == 255).all()


def test_filter_tiles_of_one_channel_show_the_sign():
    """Zero is nearly white whatever the range, and equal magnitudes are equally far from it."""
    weight = torch.tensor([[[[-2.0, 0.0, 1.0, 2.0]]], [[[0.0, 0.0, 0.0, 0.0]]]])
    tiles = figures.filter_tiles(weight).float()
    assert tiles.shape == (2, 3, 1, 4)
    least, zero, half, greatest = tiles[0].permute(2, 1, 0)[:, 0]
    assert zero.min() > 240
    assert (tiles[1] > 240).all()
    assert least[2] > least[0] + 50  # blue
    assert greatest[0] > greatest[2] + 50  # red
    assert half.sum() > greatest.sum()
    assert torch.equal(figures.filter_tiles(weight * 1000).float(), tiles)


@pytest.mark.parametrize(("count", "channels", "side"), [(1, 1, 11), (5, 1, 11), (33, 3, 11), (96, 3, 11), (20, 4, 3)])
def test_no_filter_is_cut(count, channels, side, tmp_path):
    """Every tile is in the file, in whole pixels, each weight a square of one colour."""
    weight = torch.randn(count, channels, side, side)
    figures.filters(weight, tmp_path / "filters.png")
    with Image.open(tmp_path / "filters.png") as drawn:
        found = torch.from_numpy(np.array(drawn.convert("RGB")))
    columns = min(count, 16 if count > 32 else 8)
    sheet = figures.mosaic(figures.filter_tiles(weight), columns).permute(1, 2, 0)
    scale = round(72 / side)
    large = sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    left = (found.shape[1] - large.shape[1]) // 2
    top = found.shape[0] - 10 - large.shape[0]
    assert left >= 10
    assert top >= 60
    assert torch.equal(found[top : top + large.shape[0], left : left + large.shape[1]], large)
    assert (found[: top - 1] != 255).any()  # the title
    assert (found[0] == 255).all()
    assert (found[:, [0, -1]] == 255).all()  # which is whole, too


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.9, 7), ["1", "2", "5"]), ((0.02, 3), ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
     ((1e-6, 2e6), None)],
)  # fmt: skip
def test_ticks_are_plain_numbers(ends, expected):
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=ends)
    figures.plain_numbers(axes.xaxis)
    low, high = ends
    texts = [
        axes.xaxis.get_major_formatter()(value) for value in axes.xaxis.get_majorticklocs() if low <= value <= high
    ]
    assert expected is None or texts == expected
    assert len(texts) >= 3
    assert all(re.fullmatch(r"[\d,]+|0\.\d+", text) for text in texts)


def test_names_in_scripts_that_the_font_lacks(tmp_path, recwarn):
    pictures = torch.zeros(3, 8, 8, dtype=torch.uint8)
    figures.predictions([pictures], ["\u732b.jpg"], torch.tensor([[0.3, 0.7]]), ["\u732b", "b"], tmp_path / "p.png")
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


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
    assert len(found.names) == len(set(found.names)) == 4
    assert found.links == [link for name in found.names for link in (name, "none")]  # opens, and leaves again
    assert "figure:target" in (tmp_path / "page.html").read_text()
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

"""One encoded picture: its size and colours, which way up it is, and what is said of one that cannot be read."""

import numpy as np
import pytest

pytest.importorskip("PIL")
import trees
from PIL import Image

from fastalex.data.decode import decode, square


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (256, 256), (257, 300), (90, 61), (1, 300)])
def test_size_and_middle_are_torchvisions(width, height):
    image = trees.picture(1, width, height)
    trees.assert_is_torchvisions(square(image, 64), image, 64)


def test_a_long_picture_costs_no_memory():
    """Resized as a whole, it would be 64 x 2,560,000 pixels."""
    assert square(Image.new("RGB", (40_000, 1), "red"), 64).tolist() == [[[255, 0, 0]] * 64] * 64


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_modes(mode):
    image = trees.picture(2)
    if mode == "I;16":
        grey = np.asarray(image.convert("L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    found = decode(trees.encoded(image, "JPEG" if mode in ("L", "CMYK") else "PNG"), 32)
    wanted = square(Image.fromarray(grey).convert("RGB") if mode == "I;16" else image.convert("RGB"), 32)
    assert np.abs(found.astype(int) - wanted).mean() < (4 if mode in ("L", "CMYK") else 1e-6)
    if mode in ("L", "1", "LA", "I;16"):
        assert (found[..., :1] == found).all()


def test_orientation():
    image = trees.picture(3, 60, 40)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 8  # to be shown after a quarter turn to the left
    found = decode(trees.encoded(turned, quality=95, exif=exif), 32)
    assert np.abs(found.astype(int) - square(image, 32)).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_damaged_picture():
    image = trees.picture(4)
    sound = decode(trees.encoded(image), 32)
    assert np.array_equal(decode(trees.encoded(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), 32), sound)


def test_large_jpegs_are_decoded_small(monkeypatch):
    image = trees.picture(5, 1100, 700)
    found = decode(trees.encoded(image, quality=95), 64)
    assert np.abs(found.astype(int) - square(image, 64)).mean() < 2
    asked = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a, **k: asked.append(self.size) or self)
    decode(trees.encoded(image), 64)
    assert asked == [(275, 175)]  # 1/4; 1/8 would be smaller than twice 64


@pytest.mark.parametrize(
    ("bytes_", "reason"),
    [
        (b"", "cannot be decoded: no picture in a format that Pillow knows$"),
        (b"no picture at all", "cannot be decoded: no picture in a format that Pillow knows$"),
        (b"GIF89a", "cannot be decoded"),
        (trees.encoded(trees.picture(6))[:-200], "cannot be decoded: image file is truncated"),
        (trees.encoded(trees.picture(6), "PNG")[:600], "cannot be decoded"),
        (trees.encoded(Image.new("1", (9500, 9500)), "PNG"), "refused, more than 89,478,485 pixels: 9500x9500"),
        (trees.encoded(Image.new("1", (14000, 14000)), "PNG"), "refused, more than 89,478,485 pixels"),
        (trees.encoded(Image.new("F", (9, 9)), "TIFF"), "mode F"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unreadable_pictures(bytes_, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        decode(bytes_, 32)
    # the address of an object would make two packed sets differ
    assert " at 0x" not in str(raised.value)

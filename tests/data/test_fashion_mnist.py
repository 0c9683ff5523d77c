"""The pictures that ship with the package."""

import gzip
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from fastalex.data import fashion_mnist


def test_pixels_are_the_ones_that_were_drawn():
    pixels = b"".join(fashion_mnist.load(split).images.tobytes() for split in ("train", "test"))
    assert hashlib.sha256(pixels).hexdigest() == fashion_mnist.SHA256


@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("test", 1000)])
def test_classes_are_balanced(split, count):
    images, labels = fashion_mnist.load(split)
    assert images.shape == (count, 28, 28)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [count // 10] * 10


def test_labels_belong_to_the_pictures():
    # trousers are two narrow legs, bags fill the frame: far apart in mean brightness and in its left-right spread
    images, labels = fashion_mnist.load("train")
    outer = images[:, :, :5].mean((1, 2))
    assert outer[labels == fashion_mnist.CLASSES.index("Trouser")].mean() < 5
    assert outer[labels == fashion_mnist.CLASSES.index("Bag")].mean() > 40


def test_the_file_is_small_and_has_its_notice():
    assert fashion_mnist.FILE.stat().st_size < 2_500_000
    assert "Zalando" in fashion_mnist.FILE.with_name("LICENSE").read_text("utf-8")


def test_no_training_picture_is_a_test_picture():
    train = {image.tobytes() for image in fashion_mnist.load("train").images}
    assert not [image for image in fashion_mnist.load("test").images if image.tobytes() in train]


def test_unknown_split():
    with pytest.raises(ValueError, match="'validation'"):
        fashion_mnist.load("validation")


def write_idx(path, array):
    sizes = np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()))


@pytest.fixture
def originals(tmp_path):
    """Files in the format of the originals, with 510 and 110 pictures of each class."""
    generator = np.random.default_rng(0)
    for name, per_class in (("train", 510), ("t10k", 110)):
        labels = generator.permutation(np.arange(10, dtype=np.uint8).repeat(per_class))
        images = generator.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        images[:, 0, 0] = labels
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_sample_is_sorted_by_class_and_repeatable(originals):
    pixels = fashion_mnist.sample(originals)
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
    assert images[:5000, 0, 0].tolist() == np.arange(10).repeat(500).tolist()
    assert images[5000:, 0, 0].tolist() == np.arange(10).repeat(100).tolist()
    assert len(np.unique(images, axis=0)) == 6000
    assert fashion_mnist.sample(originals) == pixels


def test_rebuild_refuses_other_pictures(originals):
    before = fashion_mnist.FILE.read_bytes()
    command = [sys.executable, "-m", "fastalex.data.fashion_mnist", str(originals)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert fashion_mnist.SHA256 in done.stderr
    assert fashion_mnist.FILE.read_bytes() == before


def test_read_idx_refuses_other_formats(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x0d\x01" + bytes(8)))
    with pytest.raises(ValueError, match="not an IDX file"):
        fashion_mnist.read_idx(path)

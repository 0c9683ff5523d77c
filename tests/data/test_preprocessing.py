"""Whole-batch crops, mirror images and normalisation."""

import pytest
import torch

from fastalex.data.image_sets import FashionMNIST, Folders
from fastalex.data.preprocessing import Preprocessing, centre_crop, random_crop, random_flip

# every pixel says where it is: 16 * row + column
WHERE = (16 * torch.arange(10)[:, None] + torch.arange(12)).to(torch.uint8).expand(400, 2, 10, 12)


def test_random_crop_takes_whole_squares_at_every_place():
    crops = random_crop(WHERE, 8)
    assert crops.shape == (400, 2, 8, 8)
    offsets = crops - centre_crop(WHERE, 8) + 16 * 1 + 2
    assert (offsets == offsets[:, :1, :1, :1]).all()
    corners = crops[:, 0, 0, 0].int()
    assert {(int(c) // 16, int(c) % 16) for c in corners} == {(y, x) for y in range(3) for x in range(5)}


def test_random_flip_mirrors_about_half_and_changes_nothing_else():
    flipped = random_flip(WHERE)
    mirrored = (flipped == WHERE.flip(-1)).flatten(1).all(1)
    same = (flipped == WHERE).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250  # 400 coins: 5 standard deviations


def test_centre_crop():
    assert centre_crop(WHERE, 8)[0, 0, 0, 0] == 16 * 1 + 2
    assert centre_crop(WHERE, 8).shape == (400, 2, 8, 8)


def test_normalise_has_the_mean_of_each_channel():
    preprocessing = Preprocessing(3, 2, 2, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = torch.tensor([1.8, 3.2, 5.6]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(preprocessing.normalise(image), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_fashion_mnist_batches(channels):
    data = FashionMNIST(FashionMNIST.preprocessing_for(channels, 64))
    order = torch.tensor([4999, 0, 500])
    (images, labels), (last, last_labels) = data.batches("train", order.split(2))
    assert images.dtype == torch.uint8
    assert images.shape == (2, channels, 68, 68)
    assert (labels.tolist(), last_labels.tolist(), len(last)) == ([9, 0], [1], 1)
    assert data.preprocessing.for_evaluation(images).shape == (2, channels, 64, 64)
    # the margin is black and is what evaluation cuts off
    assert images[..., :2].max() == 0
    assert images.sum() == centre_crop(images, 64).sum()


def test_fashion_mnist_is_normalised():
    data = FashionMNIST(FashionMNIST.preprocessing_for(1, 64))
    ((images, _),) = data.batches("train", [torch.arange(5000)])
    inputs = data.preprocessing.for_evaluation(images)
    assert abs(inputs.mean()) < 0.02
    assert abs(inputs.std() - 1) < 0.05


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("val", 1)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (90, 60), colour).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_folders(folder):
    data = Folders(folder, Preprocessing.for_photos(3, 28), workers=0)
    assert data.classes == ("blue", "red")
    assert (data.count("train"), data.count("test")) == (6, 2)
    ((images, labels),) = data.batches("test", [torch.arange(2)])
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images[:, :, 5, 5].tolist() == [[0, 0, 255], [255, 0, 0]]


def test_grey_folders_through_worker_processes(folder):
    data = Folders(folder, Preprocessing.for_photos(1, 28), workers=1)
    ((images, _),) = data.batches("train", [torch.arange(6)])
    assert images.shape == (6, 1, 32, 32)


def test_folders_name_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/train"):
        Folders(tmp_path / "nowhere", Preprocessing.for_photos(3, 28))
    (folder / "val" / "green").mkdir()
    (folder / "val" / "green" / "0.png").write_bytes((folder / "val" / "red" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="same classes"):
        Folders(folder, Preprocessing.for_photos(3, 28))

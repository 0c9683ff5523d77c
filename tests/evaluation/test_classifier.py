"""Ten crops against ten explicit slices, one by one."""

import pytest
import torch

pytest.importorskip("torchvision")

from fastalex.data.preprocessing import Preprocessing
from fastalex.evaluation.classifier import classify
from fastalex.evaluation.metrics import ten_crop_probabilities

LOOKS = Preprocessing(3, 40, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


class Spatial(torch.nn.Module):
    """A classifier that sees where things are, so that every crop and every mirror image counts."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 32 * 32, 7)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x.flatten(1)) * 10


def expected(model, images):
    size, bottom, right = 32, images.shape[2] - 32, images.shape[3] - 32
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    total = 0
    for top, left in places:
        crop = images[:, :, top : top + size, left : left + size]
        for view in (crop, crop.flip(3)):
            total = total + model(LOOKS.normalise(view)).softmax(1)
    return total / 10


def test_ten_crops_in_one_call():
    model, images = Spatial(), torch.randint(256, (3, 3, 40, 44), dtype=torch.uint8)
    with torch.no_grad():
        wanted = expected(model, images)
    model.calls = 0
    found = ten_crop_probabilities(model, images, LOOKS)
    assert model.calls == 1
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_classify_with_ten_crops_takes_the_square_in_the_middle():
    model, picture = Spatial(), torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    with torch.no_grad():
        wanted = expected(model, picture[None, :, :, 10:50])
    torch.testing.assert_close(classify(model, [picture], LOOKS, ten_crop=True), wanted)

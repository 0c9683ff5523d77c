"""Augmentation as training calls it: what it takes, that it is one operator, and what it does to pictures."""

from dataclasses import replace

import pytest
import torch

from fastalex import AlexNet, backend, ops
from fastalex.cpu.augment import draw
from fastalex.data.augmentation import augment, centre, cropped, ten_corners
from fastalex.data.preprocessing import Colours, Preprocessing
from fastalex.variants import VARIANTS

LOOKS = Preprocessing(3, 32, 28, (0.48, 0.46, 0.41), (0.23, 0.22, 0.21))
COLOURS = Colours((0.2, 0.05, 0.01), ((0.6, 0.6, 0.52), (0.8, -0.6, 0.0), (0.0, 0.0, 1.0)))
SEED = torch.tensor([7])


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


INDICES = torch.tensor([3, 14, 15, 92])


def test_crop_mirror_image_colour(images):
    """Each in turn by slices and flips."""
    y = augment(images, INDICES, 7, LOOKS, colours=COLOURS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    top, left, mirrored, normals = draw(INDICES, SEED, 32, 32, 28)
    assert 0 < mirrored.sum() < 4
    for i in range(4):
        crop = images[i, :, top[i] : top[i] + 28, left[i] : left[i] + 28].double() / 255
        if mirrored[i]:
            crop = crop.flip(2)
        for value, vector, a in zip(*COLOURS, normals[i].double(), strict=True):
            crop = crop + torch.tensor(vector, dtype=torch.float64)[:, None, None] * (0.1 * value * a)
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (LOOKS.mean, LOOKS.std))
        torch.testing.assert_close(y[i].double(), (crop - mean) / std, atol=2e-6, rtol=0)


def test_without_colours_the_crop_is_the_training_crop(images):
    y = augment(images, INDICES, 7, LOOKS)
    top, left, mirrored, _ = draw(INDICES, SEED, 32, 32, 28)
    wanted = LOOKS.normalise(images)
    for i in range(4):
        crop = wanted[i, :, top[i] : top[i] + 28, left[i] : left[i] + 28]
        torch.testing.assert_close(y[i], crop.flip(2) if mirrored[i] else crop, atol=1e-6, rtol=1e-6)


def test_blocks(images):
    """Channel (i * 4 + j) * 3 + c of a block is pixel (i, j); the padding is zero after normalisation."""
    plain = augment(images, INDICES, 7, LOOKS, colours=COLOURS)
    blocks = augment(images, INDICES, 7, LOOKS, colours=COLOURS, block=4, padding=((2, 2), (2, 2)))
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    assert blocks.shape == (4, 48, 8, 8)
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    for i in range(4):
        for j in range(4):
            channel = (i * 4 + j) * 3
            assert torch.equal(blocks[:, channel : channel + 3], padded[:, :, i::4, j::4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_backends_agree(images, mode, dtype):
    y = augment(images, INDICES, 7, LOOKS, colours=COLOURS, dtype=dtype)
    with backend.use(mode):
        other = augment(images, INDICES, SEED, LOOKS, colours=COLOURS, dtype=dtype)
    assert other.stride() == y.stride()
    step = torch.finfo(dtype).eps * y.abs() + 2e-6
    assert ((y.double() - other.double()).abs() <= step).all()


def test_jitter(images):
    plain = augment(images, INDICES, 7, LOOKS)
    assert torch.equal(augment(images, INDICES, 7, LOOKS, colours=COLOURS, jitter=0), plain)
    shift = augment(images, INDICES, 7, LOOKS, colours=COLOURS) - plain
    doubled = augment(images, INDICES, 7, LOOKS, colours=COLOURS, jitter=0.2) - plain
    torch.testing.assert_close(doubled, 2 * shift, atol=2e-6, rtol=1e-5)
    # one colour for all pixels of a picture
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), atol=2e-6, rtol=0)


def test_operator(images):
    arguments = (images, INDICES, SEED, 28, [0.5] * 3 + [0.2] * 3 + [0.01] * 9)
    for block, padding in ((1, [0] * 4), (4, [2, 2, 2, 2])):
        torch.library.opcheck(ops.augment, (*arguments, block, padding, torch.float16))
        slots = torch.tensor([2, 0, 0, 3])
        for labels in (None, torch.arange(4)):
            torch.library.opcheck(ops.augment, (*arguments, block, padding, torch.float16, slots, labels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [32, 33])
def test_ten_crops_are_torchvisions(channels, side):
    """Bit for bit on a CPU, and the centre is that of `for_evaluation`."""
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    looks = Preprocessing(channels, side, 28, LOOKS.mean[:channels], LOOKS.std[:channels])
    images = torch.randint(0, 256, (3, channels, side, 35), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    slots = torch.tensor([1, 2, 0, 0])
    with backend.use("reference"):
        expected = looks.normalise(torch.cat(transforms.ten_crop(images, [28, 28])))
        assert torch.equal(cropped(images, ten_corners(images.shape, 28), looks), expected)
        middle = centre(images.shape, 28)
        assert torch.equal(cropped(images, middle, looks, slots=slots), looks.for_evaluation(images[slots]))
    with backend.use("triton"):
        torch.testing.assert_close(
            cropped(images, ten_corners(images.shape, 28), looks), expected, atol=1e-5, rtol=1e-6
        )
    for corners in (middle, ten_corners(images.shape, 28)):
        flat = [int(number) for corner in corners for number in corner]
        colours = [*looks.mean, *looks.std]
        for given in (None, slots):
            torch.library.opcheck(ops.crops, (images, flat, 28, colours, torch.float32, given))


def test_compiled(images):
    def step(images, indices, seed):
        return augment(images, indices, seed, LOOKS, colours=COLOURS, dtype=torch.float16) * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, INDICES, SEED), step(images, INDICES, SEED))

    def resident(images, indices, slots, labels):
        return augment(images, indices, SEED, LOOKS, colours=COLOURS, slots=slots, labels=labels)

    arguments = images, INDICES[:3], torch.tensor([3, 1, 1]), torch.tensor([5, 6, 7, 8])
    found = torch.compile(resident, backend="aot_eager", fullgraph=True)(*arguments)
    for first, second in zip(found, resident(*arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_slots(images, mode):
    """Pictures of a set where they lie are those of a batch that was gathered before."""
    slots = torch.tensor([3, 0, 0, 1, 2])
    indices = torch.tensor([8, 14, 3, 15, 92])
    with backend.use(mode):
        inputs, labels = augment(
            images, indices, 7, LOOKS, colours=COLOURS, slots=slots, labels=torch.tensor([5, 6, 7, 8])
        )
        assert labels.tolist() == [8, 5, 5, 6, 7]
        assert torch.equal(inputs, augment(images[slots], indices, 7, LOOKS, colours=COLOURS))
        assert torch.equal(inputs, augment(images, indices, 7, LOOKS, colours=COLOURS, slots=slots))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(4, 3, 32, 32)}, r"images must be uint8 \(N, 3, H, W\), got torch.float32"),
        ({"images": torch.zeros(4, 32, 32, 3, dtype=torch.uint8)}, r"got torch.uint8 \(4, 32, 32, 3\)"),
        ({"indices": torch.arange(3)}, r"indices must be int64 \(4,\), got torch.int64 \(3,\)"),
        ({"indices": torch.zeros(4)}, "got torch.float32"),
        ({"slots": torch.arange(3)}, r"slots must be int64 \(4,\), got torch.int64 \(3,\)"),
        ({"slots": torch.zeros(4)}, "slots must be int64"),
        ({"labels": torch.arange(4)}, "labels need slots"),
        ({"labels": torch.arange(5), "slots": torch.arange(4)}, r"labels must be int64 \(4,\) on cpu, got .* \(5,\)"),
        (
            {"slots": torch.arange(4), "images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)},
            r"images must be in channels_last where slots are given, got strides \(3072, 1024, 32, 1\)",
        ),
        (
            {"preprocessing": Preprocessing.for_photos(3, 33)},
            r"a crop in \[1, 32\] for pictures of 32x32, got 3 and 33",
        ),
        ({"preprocessing": Preprocessing.for_photos(1, 28)}, "got 1 and 28"),
        ({"seed": torch.tensor([1.0])}, "seed must be an integer or one int64"),
        ({"seed": 2**63}, "seed must lie in"),
        ({"jitter": -0.1}, "jitter must be a number of at least 0, got -0.1"),
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16"),
        ({"block": 3}, "block must be 1 without padding, or 4, got 3"),
        ({"padding": ((1, 0), (0, 0))}, "block must be 1 without padding"),
        ({"block": 4, "padding": ((1, 0), (0, 0))}, "padding must make the crop 28 positive multiples of 4"),
    ],
)
def test_refusals(images, changes, message):
    arguments = {"images": images, "indices": INDICES, "seed": 1, "preprocessing": LOOKS} | changes
    with pytest.raises(ValueError, match=message):
        augment(**arguments)


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_outside_of_the_set_is_refused(images, slot):
    with backend.use("reference"), pytest.raises(IndexError, match=rf"slots must lie in \[0, 4\), got {slot}"):
        augment(images, INDICES, 7, LOOKS, slots=torch.tensor([0, 1, 2, slot]))


@pytest.mark.parametrize("variant", ["paper", "code2012", "bvlc_alexnet"])
def test_models_take_the_blocks(variant):
    """The same features from pictures and from their blocks."""
    narrow = replace(VARIANTS[variant], hidden=(8, 8))
    model = AlexNet(5, variant=narrow).eval()
    crop = narrow.crop
    looks = Preprocessing.for_photos(3, crop)
    images = torch.randint(0, 256, (1, 3, crop + 9, crop + 9), dtype=torch.uint8)
    plain = augment(images, INDICES[:1], 7, looks)
    blocks = augment(images, INDICES[:1], 7, looks, block=4, padding=model.block_padding(crop, crop))
    with torch.no_grad():
        torch.testing.assert_close(model.features(blocks), model.features(plain), rtol=1e-4, atol=1e-5)

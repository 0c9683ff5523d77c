"""Augmentation against the formula in float64, its draws against Philox written out here, and its machine code."""

import pytest
import torch
import triton
import triton.language as tl
from tolerances import assert_matches

from fastalex.cpu import augment as on_cpu
from fastalex.inspection import catalog, compiler
from fastalex.kernels import augment as module
from fastalex.kernels.augment import augment
from fastalex.kernels.registers import interpreting

MEAN, STD = (0.48, 0.46, 0.41), (0.23, 0.22, 0.21)
AXES = ((0.02, 0.01, 0.015), (-0.01, 0.0, 0.01), (0.004, -0.006, 0.003))
NONE = ((0.0,) * 3,) * 3
NO_PADDING = ((0, 0), (0, 0))

# height, width, crop, block, padding
GEOMETRIES = [
    (32, 32, 28, 1, NO_PADDING),
    (32, 32, 32, 1, NO_PADDING),
    (32, 36, 27, 1, NO_PADDING),  # an odd crop, as Caffe's 227: one pixel per item
    (33, 31, 24, 1, NO_PADDING),  # pictures that begin at any byte
    (32, 32, 28, 4, ((2, 2), (2, 2))),  # as conv1 of the paper: 224 + 4 = 57 * 4
    (32, 32, 28, 4, NO_PADDING),
    (37, 40, 27, 4, ((0, 1), (0, 1))),  # as the code of 2012, right and below only
    (37, 39, 29, 4, ((3, 0), (1, 2))),
    (7, 5, 5, 4, ((1, 2), (3, 4))),
    (32, 32, 29, 4, ((-3, 2), (2, -3))),
]


def philox(seed, block):
    """Four 32-bit words of Philox4x32-10 (Salmon et al. 2011) for counter (low, high half of block, 0, 0)."""
    c, key = [block & 0xFFFFFFFF, block >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ key[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ key[1], low & 0xFFFFFFFF]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def drawn(index, seed, height, width, size):
    """(top, left, mirrored, three normal numbers) of one picture, from exact integers and float64."""
    words = philox(seed, index)
    rows, columns = height - size + 1, width - size + 1
    choice = words[0] * 2 * rows * columns >> 32
    uniform = torch.tensor([(2 * (word >> 8) + 1 - 2**24) / 2**24 for word in words[1:]], dtype=torch.float64)
    return choice // 2 % rows, choice // 2 // rows, choice % 2 == 1, 2**0.5 * torch.erfinv(uniform)


def pictures(count, height, width):
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    return images.permute(0, 3, 1, 2), torch.tensor([0, 1, 5, 2**40 + 3, 77, 1281166])[:count]


def reference(x, index, seed, size, block, padding, axes=AXES, mean=MEAN, std=STD):
    """The formula, picture by picture, in float64, and the sum of the absolute values of its terms."""
    out, magnitudes = [], []
    mean, std, axes = (torch.tensor(values, dtype=torch.float64) for values in (mean, std, axes))
    for picture, number in zip(x.double(), index.tolist(), strict=True):
        top, left, mirrored, a = drawn(number, seed, *x.shape[2:], size)
        crop = picture[:, top : top + size, left : left + size]
        if mirrored:
            crop = crop.flip(2)
        terms = [crop / 255, (a @ axes)[:, None, None], -mean[:, None, None]]
        y = sum(terms) / std[:, None, None]
        magnitude = (terms[0].abs() + (a.abs() @ axes.abs())[:, None, None] + terms[2].abs()) / std[:, None, None]
        (above, below), (before, behind) = padding
        pad = (before, behind, above, below)
        out.append(torch.nn.functional.pad(y, pad))
        magnitudes.append(torch.nn.functional.pad(magnitude, pad))

    def blocks(parts):
        y = torch.stack(parts)
        n, _, height, width = y.shape
        # channel (i * block + j) * 3 + c of a block
        y = y.view(n, 3, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, 3 * block * block, height // block, width // block)

    return blocks(out), blocks(magnitudes)


# the normal numbers are good to 1e-6 of their size, 16 units of fp32's rounding; assert_matches counts in these
TERMS = 1 + 16


def check(x, index, size, block=1, padding=NO_PADDING, *, seed=-3, dtype=torch.float16, function=augment, truth=None):
    y = function(x, index, torch.tensor([seed]), size, MEAN, STD, AXES, block=block, padding=padding, dtype=dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype
    expected, magnitude = truth or reference(x, index, seed, size, block, padding)
    truncates = dtype == torch.bfloat16 and interpreting() and function is augment
    assert_matches(y, expected, terms=TERMS, magnitude=magnitude, truncates=truncates)
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("height", "width", "size", "block", "padding"), GEOMETRIES)
def test_values(height, width, size, block, padding, dtype):
    x, index = pictures(3, height, width)
    ours = check(x, index, size, block, padding, dtype=dtype)
    torchs = check(x, index, size, block, padding, dtype=dtype, function=on_cpu.augment)
    # one rounding apart: the step at the larger value, or at what was added
    step = torch.finfo(dtype).eps * torch.maximum(ours.abs(), torchs.abs()).float() + 2e-6
    assert ((ours.float() - torchs.float()).abs() <= step).all()
    if padding != NO_PADDING:
        above, before = (max(0, first) for first, _ in padding)
        first = ours[:, :, 0, 0].view(-1, block, block, 3)
        assert (first[:, :above] == 0).all()
        assert (first[:, :, :before] == 0).all()


def test_the_philox_above_is_philox():
    """The published test vector for counter and key zero."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 5, -1, 2**62 + 12345])
def test_draws_of_torch(seed):
    index = torch.tensor([0, 1, 2**31, 2**32 + 1, 2**62])
    found = on_cpu.draw(index, torch.tensor([seed]), 256, 250, 224)
    for i, number in enumerate(index.tolist()):
        top, left, mirrored, normals = drawn(number, seed, 256, 250, 224)
        assert (int(found.top[i]), int(found.left[i]), bool(found.mirrored[i])) == (top, left, mirrored)
        assert torch.equal(found.normals[i], normals.float())


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_crops_of_the_kernel_are_those_draws(seed):
    """Pictures whose values say where they lie."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(20), indexing="ij")
    x = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8).expand(12, 3, 24, 20)
    index = torch.arange(12) * 2**33 + 1
    y = augment(x, index, torch.tensor([seed]), 16, (0.0,) * 3, (1 / 255,) * 3, NONE, dtype=torch.float32)
    top, left, mirrored, _ = on_cpu.draw(index, torch.tensor([seed]), 24, 20, 16)
    assert torch.equal(y[:, 0, 0, 0].round().long(), top)
    assert torch.equal(y[:, 1, 0, :].amin(1).round().long(), left)
    assert torch.equal(y[:, 1, 0, 0] > y[:, 1, 0, 1], mirrored)
    assert 0 < int(mirrored.sum()) < 12
    assert len(set(zip(top.tolist(), left.tolist(), strict=True))) > 6


def test_every_crop_is_as_likely_as_the_next():
    top, left, mirrored, normals = on_cpu.draw(torch.arange(200_000), torch.tensor([9]), 6, 7, 4)
    counts = torch.bincount((top * 4 + left) * 2 + mirrored, minlength=24).double()
    # five standard deviations of a binomial count
    assert (counts - 200_000 / 24).abs().max() < 5 * (200_000 / 24) ** 0.5
    assert normals.mean(0).abs().max() < 5 / 200_000**0.5
    assert (normals.std(0) - 1).abs().max() < 5 / 400_000**0.5
    assert torch.corrcoef(normals.T).triu(1).abs().max() < 5 / 200_000**0.5


@triton.jit
def normal_kernel(word_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, module.normal(tl.load(word_ptr + i).to(tl.uint32, bitcast=True)))


def test_normal_numbers():
    """To 1e-6 of their size over the whole range, the ends and both sides of the seam included."""
    ends = torch.tensor([0, 255, 256, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1])
    words = torch.cat([ends, torch.randint(0, 2**20, (100,)), torch.arange(1024 - 107) * (2**32 // 917)])
    out = torch.empty(1024)
    normal_kernel[(1,)](words.to(torch.uint32).view(torch.int32), out, N=1024)
    uniform = (2 * (words >> 8) + 1 - 2**24).double() / 2**24
    expected = 2**0.5 * torch.erfinv(uniform)
    assert ((out - expected).abs() <= 1e-6 * expected.abs()).all()
    assert out.abs().max() > 5.2


def test_a_picture_depends_on_its_number_alone():
    """Not on the batch, its place in it, or the layout of memory."""
    x, index = pictures(6, 32, 32)
    seed = torch.tensor([4])
    whole = augment(x, index, seed, 28, MEAN, STD, AXES)
    for part in ([3], [5, 0, 3]):
        assert torch.equal(augment(x[part], index[part], seed, 28, MEAN, STD, AXES), whole[part])
    assert torch.equal(augment(x.contiguous(), index, seed, 28, MEAN, STD, AXES), whole)
    assert not torch.equal(augment(x, index, seed + 1, 28, MEAN, STD, AXES), whole)
    assert not torch.equal(augment(x[:1], index[1:2], seed, 28, MEAN, STD, AXES), whole[:1])


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
def test_pictures_at_any_address(shift):
    memory = torch.randint(0, 256, (shift + 2 * 32 * 32 * 3,), dtype=torch.uint8)
    x = memory[shift:].view(2, 32, 32, 3).permute(0, 3, 1, 2)
    check(x, torch.tensor([3, 4]), 28)


def test_no_byte_outside_of_the_pictures_is_read():
    """Crops in the corners, whose words reach beyond them: what lies there must not matter."""
    count = 6
    memory = torch.full((4 + count * 9 * 9 * 3 + 4,), 255, dtype=torch.uint8)
    index = torch.arange(count)
    for height, width, size, block, padding in [(6, 6, 4, 1, NO_PADDING), (6, 6, 5, 4, ((3, 0), (3, 0)))]:
        x = memory[4 : 4 + count * height * width * 3].view(count, height, width, 3).permute(0, 3, 1, 2)
        x.random_(0, 256)
        check(x, index, size, block, padding)


def test_an_empty_batch():
    x = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    none = torch.empty(0, dtype=torch.int64)
    assert augment(x, none, torch.tensor([1]), 28, MEAN, STD, AXES).shape == (0, 3, 28, 28)


X, INDEX, SEED = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), torch.tensor([0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.float()}, r"x must be uint8 \(N, 3, H, W\), got torch.float32 \(2, 3, 8, 8\)"),
        ({"x": X[:, :1]}, r"got torch.uint8 \(2, 1, 8, 8\)"),
        ({"x": X[0]}, r"got torch.uint8 \(3, 8, 8\)"),
        ({"index": INDEX.int()}, r"index must be int64 \(2,\) on cpu, got torch.int32"),
        ({"index": torch.arange(3)}, r"got torch.int64 \(3,\)"),
        ({"seed": torch.tensor([1, 2])}, "seed must be one int64"),
        ({"seed": torch.tensor([1.0])}, "seed must be one int64"),
        ({"size": 9}, r"size must lie in \[1, 8\] for pictures of 8x8, got 9"),
        ({"size": 0}, r"size must lie in \[1, 8\]"),
        ({"mean": (0.0, 0.0)}, "mean and std must be 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"axes": NONE[:2]}, "axes must be 3 vectors of 3 numbers"),
        ({"dtype": torch.float64}, "dtype must be fp16, bf16 or fp32, got torch.float64"),
        ({"block": 2}, "block must be 1 without padding, or 4"),
        ({"padding": ((1, 1), (1, 1))}, "block must be 1 without padding"),
        ({"block": 4, "padding": ((1, 1), (0, 0))}, "padding must make size 4 positive multiples of 4"),
        ({"block": 4, "padding": ((0, 0), (-4, 0))}, "padding must make size 4 positive multiples of 4"),
        ({"x": torch.empty(1, 3, 40000, 40000, dtype=torch.uint8, device="meta")}, "leaves more crops of 40000x40000"),
    ],
)
def test_refusals(changes, message):
    arguments = {"x": X, "index": INDEX, "seed": SEED, "size": 4, "mean": MEAN, "std": STD, "axes": AXES} | changes
    if arguments["x"].device.type == "meta":
        arguments |= {"index": INDEX[:1].to("meta"), "seed": SEED.to("meta")}
    with pytest.raises(ValueError, match=message):
        augment(**arguments)


@pytest.mark.parametrize("block", [1, 4])
def test_a_wrong_formula_is_noticed(block):
    x, index = pictures(3, 32, 32)
    padding = ((2, 2), (2, 2)) if block == 4 else NO_PADDING
    y = check(x, index, 28, block, padding)
    for changes in (
        {"axes": [AXES[1], AXES[0], AXES[2]]},
        {"mean": MEAN[::-1]},
        {"std": STD[::-1]},
        {"seed": -4},
        {"index": index + 1},
    ):
        wrong = reference(
            **({"x": x, "index": index, "seed": -3, "size": 28, "block": block} | changes), padding=padding
        )
        with pytest.raises(AssertionError, match="elements differ"):
            check(x, index, 28, block, padding, function=lambda *_, **__: y, truth=wrong)
    expected, magnitude = reference(x, index, -3, 28, block, padding)
    with pytest.raises(AssertionError, match="elements differ"):
        check(x, index, 28, block, padding, function=lambda *_, **__: y, truth=(expected.flip(3), magnitude.flip(3)))


# instructions per element of the design, for fp16 on sm_90: 24 conversions, multiplications, choices between a pixel
# and its mirror image; 24 masks more where blocks are padded; 12 packings, 6 shifts and 18 extractions of bytes
DESIGN = {"pictures": 8.0, "pictures_space_to_depth": 12.0}
# bytes of a crop of 224 of 256 pixels, and of half a picture and blocks
FLOOR = {"pictures": 224 * 224 * 3 * 3, "pictures_space_to_depth": 224 * 224 * 3 + 57 * 57 * 48 * 2}


IN_SECONDS = [("pictures", "sm_90"), ("pictures_space_to_depth", "traffic")]


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        pytest.param(layer, target, marks=() if (layer, target) in IN_SECONDS else pytest.mark.slow)
        for layer in DESIGN
        for target in (*compiler.TARGETS, "traffic")
    ],
)
def test_machine_code_and_traffic(layer, target):
    name = f"paper/{layer}/augment/forward/fp16/channels_last"
    [found] = compiler.results([(name, target)])[name, target]
    if target == "traffic":
        moved = (found["read"] + found["written"]) * catalog.ENTRIES[name].image_elements
        # rows of a crop begin and end within a sector of 32 bytes
        assert FLOOR[layer] <= moved <= FLOOR[layer] + 224 * 64 + 64
        return
    assert found["spills"] == found["stack"] == found["shared"] == 0
    if target != "gfx942":
        assert found["stores"] == {"16": 3}
        assert set(found["loads"]) == {"8", "4"}
    if target == "sm_90":
        assert found["instructions"] <= 1.1 * DESIGN[layer]

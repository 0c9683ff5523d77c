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
    y, _ = function(x, index, torch.tensor([seed]), size, MEAN, STD, AXES, block=block, padding=padding, dtype=dtype)
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
    y, _ = augment(x, index, torch.tensor([seed]), 16, (0.0,) * 3, (1 / 255,) * 3, NONE, dtype=torch.float32)
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
    whole, _ = augment(x, index, seed, 28, MEAN, STD, AXES)
    for part in ([3], [5, 0, 3]):
        assert torch.equal(augment(x[part], index[part], seed, 28, MEAN, STD, AXES)[0], whole[part])
    assert torch.equal(augment(x.contiguous(), index, seed, 28, MEAN, STD, AXES)[0], whole)
    assert not torch.equal(augment(x, index, seed + 1, 28, MEAN, STD, AXES)[0], whole)
    assert not torch.equal(augment(x[:1], index[1:2], seed, 28, MEAN, STD, AXES)[0], whole[:1])


@pytest.mark.parametrize("function", [augment, on_cpu.augment])
@pytest.mark.parametrize(("block", "padding"), [(1, NO_PADDING), (4, ((2, 2), (2, 2)))])
def test_a_set_and_slots_are_the_batch_that_they_name(block, padding, function):
    """Bit for bit; the number that seeds a picture is not the place where it lies."""
    x, _ = pictures(6, 32, 32)
    x = torch.cat([x, x.flip(2)]).contiguous(memory_format=torch.channels_last)
    slots, index = torch.tensor([11, 0, 3, 3, 7]), torch.tensor([5, 2**40, 1, 2, 77])
    labels = torch.arange(12) * 10
    options = {"block": block, "padding": padding, "dtype": torch.float16}
    arguments = index, torch.tensor([3]), 28, MEAN, STD, AXES
    found, taken = function(x, *arguments, slots=slots, labels=labels, **options)
    assert torch.equal(found, function(x[slots], *arguments, **options)[0])
    assert taken.tolist() == [110, 0, 30, 30, 70]
    again, none = function(x, *arguments, slots=slots, **options)
    assert torch.equal(found, again)
    assert none.shape == (0,)
    assert not torch.equal(found, function(x, *arguments, slots=slots.flip(0), **options)[0])


@pytest.mark.parametrize("slot", [-1, 4, 2**40, -(2**63)])
def test_a_slot_outside_of_the_set(slot):
    """Is NaN in the kernel, which reads the memory of the set only, and refused where the host can read it."""
    memory = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
    x = memory[1:5].permute(0, 3, 1, 2)
    arguments = torch.arange(3), torch.tensor([3]), 28, MEAN, STD, AXES
    slots, labels = torch.tensor([3, slot, 0]), torch.arange(4)
    for padding, block in ((NO_PADDING, 1), (((2, 2), (2, 2)), 4)):
        y, taken = augment(x, *arguments, slots=slots, labels=labels, block=block, padding=padding)
        assert not y[0::2].isnan().any()
        assert y[1].isnan().any()
        assert y[1].isnan().all() or block == 4
        assert taken[0::2].tolist() == [3, 0]
        assert int(taken[1]) in (0, 3)
    with pytest.raises(IndexError, match=rf"slots must lie in \[0, 4\), got {slot}"):
        on_cpu.augment(x, *arguments, slots=slots)


@pytest.mark.parametrize("function", [augment, on_cpu.augment])
def test_pictures_beyond_two_gigabytes(function, tmp_path):
    """Offsets of more than 32 bits, in a file that is mostly a hole; as bytes where a picture is no whole words."""
    for side in (256, 255):
        size = side * side * 3
        path = tmp_path / str(side)
        with path.open("wb") as file:
            file.truncate(2**32 + 2 * size)
        count = 2**32 // size + 2
        x = torch.from_file(str(path), shared=True, size=count * size, dtype=torch.uint8).view(count, side, side, 3)
        x = x.permute(0, 3, 1, 2)
        few, index = torch.tensor([2**31 // size + 1, count - 1]), torch.tensor([8, 9])
        x[few] = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        assert int(few[0]) * size > 2**31
        assert int(few[1]) * size > 2**32 - size
        arguments = index, torch.tensor([3]), 16, MEAN, STD, AXES
        found, _ = function(x, *arguments, slots=few)
        assert torch.equal(found, function(x[few], *arguments)[0])


CORNERS = [(0, 0, False), (3, 2, True), (4, 4, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 31)])
def test_crops_at_corners(height, width, dtype):
    """Of a batch, and of a set by slots, the missing one NaN: against slices and flips in float64."""
    x, _ = pictures(3, height, width)
    size = min(height, width) - 4
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    corners = [(min(top, height - size), min(left, width - size), mirrored) for top, left, mirrored in CORNERS]
    parts = [
        x[..., t : t + size, k : k + size].flip(3) if m else x[..., t : t + size, k : k + size] for t, k, m in corners
    ]
    expected = (torch.cat(parts).double() / 255 - mean) / std
    magnitude = (torch.cat(parts).double() / 255 + mean) / std
    for function in (module.crops, on_cpu.crops):
        y = function(x, corners, size, MEAN, STD, dtype=dtype)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_matches(y, expected, terms=3, magnitude=magnitude)
        slots = torch.tensor([2, 0, 0, 1])
        chosen = function(x, corners, size, MEAN, STD, dtype=dtype, slots=slots)
        assert torch.equal(chosen, y.unflatten(0, (3, 3))[:, slots].flatten(0, 1))
    missing = module.crops(x, corners, size, MEAN, STD, slots=torch.tensor([3, 1])).unflatten(0, (3, 2))
    assert missing[:, 0].isnan().all()
    assert not missing[:, 1].isnan().any()
    with pytest.raises(IndexError, match=r"slots must lie in \[0, 3\), got 3"):
        on_cpu.crops(x, corners, size, MEAN, STD, slots=torch.tensor([3]))
    for wrong in ([], [(0, 5, False)], [(-1, 0, False)]):
        with pytest.raises(
            ValueError, match=f"corners must be those of crops of {size} pixels in {height}x{width}, got"
        ):
            module.crops(x, wrong, size, MEAN, STD)


def test_the_set_of_imagenet():
    """252 GB, as a meta tensor: its launch is recorded, with the sizes that the kernel gets."""
    [launch] = catalog.launches(catalog.ENTRIES["paper/resident/augment/forward/fp16/channels_last"])
    assert launch.argument("pictures") == 1_281_167
    assert launch.argument("x_ptr").shape == (1_281_167 * 256 * 256 * 3 // 4,)


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
    assert augment(x, none, torch.tensor([1]), 28, MEAN, STD, AXES)[0].shape == (0, 3, 28, 28)
    x = torch.empty(2, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    y, labels = augment(x, none, torch.tensor([1]), 28, MEAN, STD, AXES, slots=none, labels=torch.arange(2))
    assert y.shape == (0, 3, 28, 28)
    assert labels.shape == (0,)


X, INDEX, SEED = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), torch.tensor([0])
LAST = X.contiguous(memory_format=torch.channels_last)


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
        ({"slots": INDEX.int()}, r"slots must be int64 \(N,\) on cpu, got torch.int32 \(2,\)"),
        ({"slots": INDEX}, "x must be in channels_last where slots are given"),
        ({"slots": INDEX, "x": LAST, "index": torch.arange(3)}, r"index must be int64 \(2,\)"),
        ({"labels": INDEX}, "labels need slots"),
        ({"labels": torch.arange(3), "slots": INDEX, "x": LAST}, r"labels must be int64 \(2,\) on cpu, got .* \(3,\)"),
        ({"slots": INDEX, "x": LAST[:0]}, r"x must hold pictures where slots name 2 of them, got \(0, 3, 8, 8\)"),
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
            check(x, index, 28, block, padding, function=lambda *_, **__: (y, None), truth=wrong)
    expected, magnitude = reference(x, index, -3, 28, block, padding)
    with pytest.raises(AssertionError, match="elements differ"):
        check(
            x,
            index,
            28,
            block,
            padding,
            function=lambda *_, **__: (y, None),
            truth=(expected.flip(3), magnitude.flip(3)),
        )


# instructions per element of the design, for fp16 on sm_90: 24 conversions, multiplications, choices between a pixel
# and its mirror image; 24 masks more where blocks are padded; 12 packings, 6 shifts and 18 extractions of bytes
DESIGN = {"pictures": 8.0, "pictures_space_to_depth": 12.0}
DESIGN |= {layer.replace("pictures", "resident"): count for layer, count in DESIGN.items()}
# bytes of a crop of 224 of 256 pixels, and of half a picture and blocks
FLOOR = {"pictures": 224 * 224 * 3 * 3, "pictures_space_to_depth": 224 * 224 * 3 + 57 * 57 * 48 * 2}
FLOOR |= {layer.replace("pictures", "resident"): moved for layer, moved in FLOOR.items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", [*compiler.TARGETS, "traffic"])
def test_ten_crops_are_one_launch(target):
    """Which reads each picture once, and writes its ten crops."""
    name = "paper/ten_crops/augment/inference/fp32/channels_last"
    [found] = compiler.results([(name, target)])[name, target]
    if target == "traffic":
        elements = catalog.ENTRIES[name].image_elements
        assert found["written"] * elements == 10 * 224 * 224 * 3 * 4
        assert found["read"] * elements <= 256 * 256 * 3 + 32
        return
    assert found["spills"] == found["stack"] == found["shared"] == 0
    if target != "gfx942":
        assert found["stores"] == {"16": 6}


IN_SECONDS = [("resident", "sm_90"), ("resident_space_to_depth", "traffic")]


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
        # rows of a crop begin and end within a sector of 32 bytes; number, seed, slot, label
        assert FLOOR[layer] <= moved <= FLOOR[layer] + 224 * 64 + 5 * 32
        assert moved <= 1.05 * (FLOOR[layer] + 224 * 32)  # of what a crop's sectors and the output are on average
        return
    assert found["spills"] == found["stack"] == found["shared"] == 0
    if target != "gfx942":
        labels = {"8": 1} if layer.startswith("resident") else {}
        assert found["stores"] == {"16": 3} | labels
        assert set(found["loads"]) == {"8", "4"}
    if target == "sm_90":
        assert found["instructions"] <= 1.1 * DESIGN[layer]

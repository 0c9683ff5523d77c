"""Space to depth against the formula in float64, and the convolution that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from tolerances import assert_matches

from fastalex.inspection import catalog, compiler, traffic
from fastalex.kernels.registers import interpreting
from fastalex.kernels.space_to_depth import fold_weight, space_to_depth, unfold_weight_grad

MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.1), (0.229, 0.224, 0.225, 0.3, 1.5)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def image(*shape, dtype=torch.uint8, layout=torch.contiguous_format):
    values = torch.randint(0, 256, shape) if dtype == torch.uint8 else torch.randn(shape)
    return values.to(dtype).contiguous(memory_format=layout)


def reference(x, block, padding=((0, 0), (0, 0)), mean=None, std=None):
    """From the formula, element by element of a block: no reshaping that could be wrong in the same way."""
    channels = x.shape[1]
    wide = x.double() / (255 if x.dtype == torch.uint8 else 1)
    if mean is not None:
        wide = (wide - torch.tensor(mean).double().view(channels, 1, 1)) / torch.tensor(std).double().view(
            channels, 1, 1
        )
    (top, bottom), (left, right) = padding
    wide = F.pad(wide, (left, right, top, bottom))
    return torch.cat([wide[:, :, i::block, j::block] for i in range(block) for j in range(block)], 1)


def check(x, block, padding=((0, 0), (0, 0)), normalise=False, dtype=None, truth=None):
    channels = x.shape[1]
    mean, std = (MEAN[:channels], STD[:channels]) if normalise else (None, None)
    y = space_to_depth(x, block, padding, mean=mean, std=std, dtype=dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = reference(x, block, padding, mean, std) if truth is None else truth
    # the largest of what is added: x / std and mean / std
    magnitude = expected.abs() + 2 * max(MEAN) / min(STD) if normalise else None
    assert_matches(y, expected, magnitude=magnitude, truncates=y.dtype == torch.bfloat16 and interpreting())
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "block", "padding"),
    [
        ((2, 3, 12, 20), 4, ((2, 2), (2, 2))),
        ((1, 3, 11, 19), 4, ((0, 1), (0, 1))),  # an odd row: nothing is aligned
        ((3, 3, 12, 8), 4, ((0, 4), (0, 4))),
        ((2, 3, 13, 18), 4, ((0, -1), (3, -1))),
        ((2, 1, 6, 10), 2, ((0, 0), (0, 0))),
        ((2, 5, 5, 7), 2, ((1, 0), (0, 1))),
        ((1, 8, 16, 8), 8, ((0, 0), (8, 0))),
        ((2, 3, 4, 5), 1, ((0, 0), (0, 0))),
    ],
    ids=str,
)
def test_shapes(shape, block, padding, layout):
    for dtype in (torch.uint8, torch.float16):
        check(image(*shape, dtype=dtype, layout=LAYOUTS[layout]), block, padding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_normalisation(source, dtype):
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    x = image(1, 3, 8, 12, dtype=source, layout=layout)
    check(x, 4, ((2, 2), (2, 2)), normalise=True, dtype=dtype)


def test_default_dtypes():
    assert space_to_depth(image(1, 3, 4, 4), 4).dtype == torch.float16
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert space_to_depth(image(1, 3, 4, 4, dtype=dtype), 4).dtype == dtype


def test_padding_is_zero_after_normalisation():
    y = space_to_depth(torch.zeros(1, 1, 2, 2), 2, ((2, 0), (0, 2)), mean=(1.0,), std=(0.5,))
    assert y[0, :, 1, 0].tolist() == [-2.0] * 4
    assert not y[0, :, 0].any()
    assert not y[0, :, :, 1].any()


def test_nan_and_infinities_stay_in_their_place():
    x = torch.ones(1, 3, 8, 8)
    x[0, 0, 3, 5], x[0, 2, 7, 0] = torch.nan, torch.inf
    check(x, 4)


def test_strided_expanded_and_empty():
    x = image(2, 3, 16, 24)
    check(x[:, :, ::2, ::3], 4)
    check(x[:, :1].expand(2, 3, 16, 24), 4)
    assert space_to_depth(x[:0], 4).shape == (0, 48, 4, 6)


@pytest.mark.parametrize("kernel", [(11, 11), (8, 4), (5, 12), (3, 1)])
@pytest.mark.parametrize("block", [2, 4])
def test_folded_convolution(block, kernel):
    """conv2d with a stride is conv2d without one on blocks: exactly, on integers; and so are the gradients."""
    x = torch.randint(-8, 8, (2, 3, 24, 16)).double()
    w = torch.randint(-8, 8, (5, 3, *kernel)).double().requires_grad_()
    strided = F.conv2d(x, w, stride=block)
    rows, columns = (out + (k - 1) // block for out, k in zip(strided.shape[2:], kernel, strict=True))
    padding = ((0, rows * block - 24), (0, columns * block - 16))
    folded = fold_weight(w, block)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert folded.shape == (5, block * block * 3, -(-kernel[0] // block), -(-kernel[1] // block))
    blocks = check(x.float(), block, padding).double()
    assert torch.equal(F.conv2d(blocks, folded), strided)

    grad = torch.randint(-8, 8, strided.shape).double()
    (expected,) = torch.autograd.grad(strided, w, grad)
    (through_fold,) = torch.autograd.grad(F.conv2d(blocks, folded), w, grad)
    of_folded = torch.nn.grad.conv2d_weight(blocks, folded.shape, grad)
    assert torch.equal(through_fold, expected)
    assert torch.equal(unfold_weight_grad(of_folded, kernel, block), expected)


def test_folding_there_and_back():
    w = torch.randn(4, 3, 11, 7)
    assert torch.equal(unfold_weight_grad(fold_weight(w, 4), (11, 7), 4), w)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8, 8), 4), r"x must be \(N, C, H, W\), got shape \(3, 8, 8\)"),
        ((torch.zeros(1, 3, 8, 8).double(), 4), "x must be uint8, fp16, bf16 or fp32, got torch.float64"),
        ((torch.zeros(1, 3, 9, 9), 3), "block must be a power of two .* got 3 for 3 channels"),
        ((torch.zeros(1, 96, 8, 8), 4), "got 4 for 96 channels"),
        ((torch.zeros(1, 3, 8, 9), 4), "multiples of block 4, got .* for 8x9"),
        ((torch.zeros(1, 3, 8, 8), 4, ((-8, 0), (0, 0))), "positive multiples"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        space_to_depth(*arguments)


@pytest.mark.parametrize("wrong", [{"mean": (0.0,)}, {"std": (1.0, 0.0, 1.0)}, {"std": (1.0, 1.0)}])
def test_refused_normalisation(wrong):
    with pytest.raises(ValueError, match="mean and std must be 3 numbers, std above 0"):
        space_to_depth(torch.zeros(1, 3, 8, 8), 4, **wrong)
    with pytest.raises(ValueError, match="dtype must be"):
        space_to_depth(torch.zeros(1, 3, 8, 8), 4, dtype=torch.float64)


def test_wrong_orders_are_noticed():
    x = image(1, 3, 8, 8)
    right = reference(x, 4)
    swapped = reference(x.transpose(2, 3), 4).transpose(2, 3)
    channel_first = right.unflatten(1, (16, 3)).transpose(1, 2).flatten(1, 2)
    for wrong in (swapped, channel_first, right.roll(1, 1), right.roll(1, 3)):
        with pytest.raises(AssertionError, match="elements differ"):
            check(x, 4, truth=wrong)


@pytest.mark.parametrize(("batch", "large"), [(13000, False), (14000, True)])
def test_items_become_64_bit(batch, large):
    with catalog.recording() as launches:
        space_to_depth(torch.empty(batch, 3, 224, 224, dtype=torch.uint8, device="meta"), 4, ((2, 2), (2, 2)))
    assert launches[0].constants["LARGE"] == large


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic(layout):
    """One image of bytes is read once, 150 KB, and its half-precision blocks are written once, 312 KB."""
    with traffic.counting() as counted:
        space_to_depth(image(1, 3, 224, 224, layout=LAYOUTS[layout]), 4, ((2, 2), (2, 2)))
    assert counted == [("space_to_depth_kernel", 3 * 224 * 224, 48 * 57 * 57 * 2)]


def test_compiled_code():
    """16-byte stores, loads as wide as the padding leaves them aligned, no shared memory; also for AMD."""
    jobs = {}
    for target in (80, 90, 100, "gfx942"):
        for source, pointer, unit, piece in (("uint8", "*u8", 255.0, 2), ("fp16", "*fp16", 1.0, 2)):
            types = {"x_ptr": pointer, "y_ptr": "*fp16"} | dict.fromkeys(
                ("items", "height", "width", "out_height", "out_width", "top", "left"), "i32"
            )
            constants = {"SCALE": (1 / unit,) * 3, "SHIFT": (0.0,) * 3, "C": 3, "PLANES": 3, "SQUARE": 4, "ROWS": 2}
            constants |= {"PIECE": piece, "VEC": 8, "LARGE": False, "BLOCK": 128}
            jobs[f"{source} {target}"] = ("space_to_depth", "space_to_depth_kernel", types, constants, target)
    for name, build in compiled(jobs).items():
        assert build["shared"] == 0
        if "gfx942" in name:
            assert build["amdgcn"].count("global_store_dwordx4") == 3
        else:
            assert build["ptx"].count("st.global.v4.b32") == 3
            assert build["ptx"].count("ld.global") == 12
            assert ("ld.global.b16" if "uint8" in name else "ld.global.b32") in build["ptx"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_machine_code(target):
    """No spills, 24 elements for 12 loads and 3 stores.

    Per element a third of the 35 instructions that an H100 issues while it moves the element's 4 bytes.
    """
    request = "paper/conv1/space_to_depth/forward/fp16/channels_last", target
    (code,) = compiler.results([request])[request]
    assert code["spills"] == code["stack"] == code["shared"] == 0
    assert (code["loads"], code["stores"]) == ({"4": 12}, {"16": 3})
    assert code["instructions"] <= 12

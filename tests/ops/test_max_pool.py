"""The operator behind max_pool2d."""

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import LAYOUTS, MODES, check_against_reference, check_citizenship, tensor

from fastalex import backend, ops
from fastalex import functional as F


def pool(x):
    return F.max_pool2d(x, 3, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_reference(mode, layout, dtype):
    if mode == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16")
    x = tensor(2, 16, 9, 8, dtype=dtype, layout=LAYOUTS[layout])
    # a sum of at most four gradients, each below five standard deviations
    check_against_reference(pool, [x], terms=4, magnitudes=[None, torch.full(x.shape, 20.0)], mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_indices_are_torchs(mode):
    x = torch.randint(-2, 3, (2, 8, 9, 9)).float()
    with backend.use(mode):
        output, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    expected, expected_indices = torch_functional.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(output, expected)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(pool, [tensor(2, 8, 7, 7, layout=LAYOUTS[layout])])


def test_opcheck():
    for layout in LAYOUTS.values():
        for codes in (True, False):
            x = tensor(2, 8, 7, 7, layout=layout).requires_grad_(codes)
            torch.library.opcheck(ops.max_pool2d, (x, [3, 3, 2, 2, 1, 1, 1, 1], True, codes))
    _, codes = ops.max_pool2d(x, [3, 3, 2, 2, 0, 0, 1, 1], False, True)
    torch.library.opcheck(ops.max_pool2d_indices, (codes, [7, 7], [3, 3, 2, 2, 0, 0, 1, 1]))


def test_gradcheck():
    x = torch.randperm(2 * 2 * 7 * 6).double().div(50).view(2, 2, 7, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: F.max_pool2d(t, 3, 2, 1), x)


def test_inference_keeps_no_codes():
    _, codes = ops.max_pool2d(torch.randn(1, 8, 7, 7), [3, 3, 2, 2, 0, 0, 1, 1], False, False)
    assert codes.numel() == 0


def test_what_is_saved():
    """One byte per window."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pool(tensor(2, 8, 9, 9))
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int8, (2, 8, 4, 4))]


def test_unbatched_expanded_and_empty():
    base = torch.randn(2, 8, 1, 9)
    for x in (
        torch.randn(3, 7, 7),
        base.expand(2, 8, 6, 9),
        torch.randn(0, 8, 7, 7),
        torch.randn(2, 8, 14, 7)[:, :, ::2],
    ):
        assert torch.equal(pool(x), torch_functional.max_pool2d(x, 3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3, "stride": 0}, r"stride must be at least 1, got \(0, 0\)"),
        ({"kernel_size": 3, "padding": 2}, r"padding must be at most half of kernel_size, got \(2, 2\)"),
        ({"kernel_size": 3, "dilation": 4}, r"does not fit into the input's height 7"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        F.max_pool2d(torch.randn(1, 4, 7, 7), **arguments)

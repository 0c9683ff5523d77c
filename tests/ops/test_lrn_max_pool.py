"""The operator behind lrn_max_pool2d, fused or composed."""

import importlib

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import LAYOUTS, MODES, check_citizenship, tensor
from tolerances import assert_matches

from fastalex import backend, ops
from fastalex import functional as F

LRN = (5, 0.5, 0.75, 2.0)


def lrn_max_pool(x, **kwargs):
    return F.lrn_max_pool2d(x, *LRN, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("after_relu", [False, True])
@pytest.mark.parametrize("window", [(3, 2), (2, 2)], ids=["fused", "composed"])
def test_against_reference(mode, layout, after_relu, window):
    """float32, where no two values of a window round to the same."""
    x = tensor(2, 16, 9, 7, layout=LAYOUTS[layout])
    x = torch.relu(x).detach().requires_grad_() if after_relu else x
    with backend.use(mode):
        y = lrn_max_pool(x, kernel_size=window[0], stride=window[1], after_relu=after_relu)
        grad = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    expected = torch_functional.max_pool2d(torch_functional.local_response_norm(wide, *LRN), *window)
    (expected_dx,) = torch.autograd.grad(expected, wide, grad.double())
    if after_relu:  # the gradient before the ReLU
        expected_dx = expected_dx * (wide > 0)
    assert_matches(y.detach(), expected.detach(), terms=5)
    # at most four pooled gradients below five standard deviations, and their share in five neighbours; x < 5, s > 2
    assert_matches(dx, expected_dx, terms=12, magnitude=torch.full(dx.shape, 20 * (1 + 0.15 * 5 * 5 * 5 / 2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_fused_is_the_composition(mode, dtype):
    """Bit for bit, the codes through the gradients."""
    x = torch.relu(tensor(2, 16, 9, 9, dtype=dtype, layout=torch.channels_last)).detach()
    with backend.use(mode):
        a = F.max_pool2d(F.local_response_norm(x, *LRN), 3, 2)
        assert torch.equal(lrn_max_pool(x, after_relu=True), a)


@pytest.mark.parametrize("mode", MODES)
def test_the_fused_kernel_runs(mode, monkeypatch):
    """3x3 windows with stride 2 never take the two kernels one after the other."""
    with backend.use(mode):
        x = tensor(1, 16, 7, 7, layout=torch.channels_last)
        room = "kernels" if mode == "triton" else "cpu"
        for name in ("lrn", "max_pool"):
            module = importlib.import_module(f"fastalex.{room}.{name}")
            for function in ("lrn_fwd", "lrn_bwd", "max_pool_fwd", "max_pool_bwd"):
                if hasattr(module, function):
                    monkeypatch.setattr(module, function, None)
        lrn_max_pool(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(lrn_max_pool, [tensor(2, 8, 7, 7, layout=LAYOUTS[layout])])


def test_opcheck():
    for layout in LAYOUTS.values():
        x = tensor(2, 8, 7, 7, layout=layout)
        torch.library.opcheck(ops.lrn_max_pool2d, (x, [*LRN, 1], [3, 3, 2, 2], False, True))


def test_gradcheck():
    x = torch.randperm(1 * 8 * 5 * 5).double().div(100).view(1, 8, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lrn_max_pool, x)


def test_what_is_saved():
    """The input and one byte per window."""
    saved = []
    x = tensor(2, 8, 9, 9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lrn_max_pool(x)
    assert sorted((str(t.dtype), tuple(t.shape)) for t in saved) == [
        ("torch.float32", (2, 8, 9, 9)),
        ("torch.int8", (2, 8, 4, 4)),
    ]


def test_bad_arguments():
    with pytest.raises(ValueError, match="does not fit into the input's height 2"):
        lrn_max_pool(torch.randn(1, 8, 2, 5))
    with pytest.raises(ValueError, match="groups must be positive and divide the 8 channels, got 3"):
        lrn_max_pool(torch.randn(1, 8, 5, 5), groups=3)

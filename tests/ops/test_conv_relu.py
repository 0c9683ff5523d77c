"""The operators behind conv2d_relu and conv2d_relu_max_pool2d."""

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import LAYOUTS, MODES, check_against_reference, check_citizenship, tensor
from tolerances import assert_matches

from fastalex import backend, ops
from fastalex import functional as F

GEOMETRY = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
NORM = F.ResponseNorm(5, 0.5, 0.75, 2.0)


def inputs(dtype=torch.float32, layout=torch.contiguous_format):
    return [
        tensor(2, 8, 9, 11, dtype=dtype, layout=layout),
        tensor(16, 4, 3, 3, dtype=dtype, layout=layout, scale=0.3),
        tensor(16, dtype=dtype),
    ]


def conv(x, w, b):
    return F.conv2d_relu(x, w, b, **GEOMETRY)


def magnitudes(x, w, b):
    """Sums of absolute values, with incoming gradients below five standard deviations."""
    x, w, b = (t.detach().double().abs().requires_grad_() for t in (x, w, b))
    output = torch_functional.conv2d(x, w, b, **GEOMETRY)
    return [output.detach(), *torch.autograd.grad(output, (x, w, b), torch.full_like(output, 5.0))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_reference(mode, layout):
    tensors = inputs(layout=LAYOUTS[layout])
    # the longest sum is the bias gradient's, over 2 x 9 x 5 pixels
    check_against_reference(conv, tensors, terms=90, magnitudes=magnitudes(*tensors), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [None, NORM], ids=["pool", "lrn pool"])
def test_stage(mode, layout, norm):
    """The stage as one node equals its parts, and gives the gradients of torch's modules in float64."""
    x, w, b = inputs(layout=LAYOUTS[layout])
    with backend.use(mode):
        y = F.conv2d_relu_max_pool2d(x, w, b, **GEOMETRY, norm=norm)
        grad = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, w, b), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    z = torch.relu(torch_functional.conv2d(*wide, **GEOMETRY))
    z = z if norm is None else torch_functional.local_response_norm(z, *norm[:4])
    expected = torch_functional.max_pool2d(z, 3, 2)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    sums = magnitudes(x, w, b)
    assert_matches(y.detach(), expected.detach(), terms=50, magnitude=sums[0].max().expand(y.shape))
    for actual, wanted, magnitude in zip(grads, expected_grads, sums[1:], strict=True):
        # each activation's gradient is a sum of up to four pooled ones and five neighbours' shares
        assert_matches(actual, wanted, terms=120, magnitude=4 * 5 * magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(conv, inputs(layout=LAYOUTS[layout]))
    check_citizenship(
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM), inputs(layout=LAYOUTS[layout])
    )


def test_channels_last_if_either_is():
    x, w, b = inputs()
    assert conv(x, w.contiguous(memory_format=torch.channels_last), b).is_contiguous(memory_format=torch.channels_last)
    assert conv(x, w, b).is_contiguous()


def test_opcheck():
    for layout in LAYOUTS.values():
        x, w, b = inputs(layout=layout)
        torch.library.opcheck(ops.conv2d_relu, (x, w, b, [1, 2], [1, 0], [1, 1], 2))
        torch.library.opcheck(ops.conv2d_relu, (x, w, None, [1, 2], [1, 0], [1, 1], 2))
        stage = (x, w, b, [1, 1], [1, 1], [1, 1], 2)
        torch.library.opcheck(ops.conv2d_relu_pool, (*stage, *NORM, [3, 3], [2, 2], True))
        torch.library.opcheck(ops.conv2d_relu_pool, (*stage, *F.ResponseNorm(0), [3, 3], [2, 2], True))


def test_gradcheck():
    x, w, b = (t.detach().double().requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(conv, (x[:1, :, :5, :5].detach().requires_grad_(), w, b))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed(needs):
    tensors = [t.requires_grad_(need) for t, need in zip(inputs(), needs, strict=True)]
    conv(*tensors).sum().backward()
    F.conv2d_relu_max_pool2d(*tensors, **GEOMETRY, norm=NORM).sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)


def test_pooling_stage_keeps_no_activation():
    """Without LRN the codes are enough: input, weight and one byte per window."""
    saved = []
    x, w, b = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2)
    shapes = sorted(tuple(t.shape) for t in saved if t.numel())
    assert shapes == sorted([tuple(x.shape), tuple(w.shape), (2, 16, 4, 5)])


def test_autocast_runs_in_its_dtype():
    x, w, b = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, w, b)
        stage = F.conv2d_relu_max_pool2d(x, w, b, **GEOMETRY)
    assert y.dtype == stage.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_empty_batch():
    x, w, b = inputs()
    y = conv(x[:0], w, b)
    assert y.shape == (0, 16, 9, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (8, 9, 11)}, ValueError, r"input must be \(N, C, H, W\), got shape \(8, 9, 11\)"),
        ({"x": (2, 6, 9, 11)}, ValueError, "input has 6 channels, weight .* with groups=2 takes 8"),
        ({"b": (15,)}, ValueError, r"bias must have shape \(16,\)"),
        ({"x": (2, 8, 0, 11)}, ValueError, "larger than the padded input height 2"),
    ],
)
def test_bad_shapes(change, error, message):
    shapes = {"x": (2, 8, 9, 11), "w": (16, 4, 3, 3), "b": (16,), **change}
    with pytest.raises(error, match=message):
        conv(*(torch.randn(s) for s in shapes.values()))


def test_mixed_dtypes_and_devices():
    x, w, b = (t.detach() for t in inputs())
    with pytest.raises(RuntimeError, match=r"weight is torch\.float16 but input is torch\.float32"):
        conv(x, w.half(), b)
    with pytest.raises(RuntimeError, match="bias is on meta but input is on cpu"):
        conv(x, w, b.to("meta"))

"""The operators behind feature_distance and fastalex.LPIPS."""

import math

import pytest
import torch
from operator_checks import LAYOUTS, MODES, check_against_reference, check_citizenship, tensor

from fastalex import backend, ops, reference
from fastalex import functional as F
from fastalex.ops.trunks import TRUNKS

# exact in half precision
WEIGHT = torch.arange(40, 64) / 64


def distance(a, b, spatial=False):
    return F.feature_distance(a, b, WEIGHT.to(a.dtype), spatial=spatial)


def magnitudes(a, b, spatial):
    """Of the distance, and of its gradients under a normal gradient of at most five."""
    pixels = 1 if spatial else a.shape[2] * a.shape[3]
    norms = [torch.linalg.vector_norm(x.detach().double(), dim=1, keepdim=True) for x in (a, b)]
    shape = (a.shape[0], *a.shape[2:]) if spatial else a.shape[:1]
    return [torch.full(shape, 4.0).double(), *((40 / pixels / norm).expand(a.shape) for norm in norms)]


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_against_reference(mode, layout, dtype, spatial):
    a, b = (tensor(2, 24, 3, 5, dtype=dtype, layout=LAYOUTS[layout]) for _ in range(2))

    def function(x, y):
        return distance(x, y, spatial)

    check_against_reference(function, [a, b], terms=24 + 15, magnitudes=magnitudes(a, b, spatial), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(distance, [tensor(2, 24, 3, 4, layout=LAYOUTS[layout]) for _ in range(2)])


def test_opcheck():
    for layout in LAYOUTS.values():
        a, b = (tensor(2, 24, 3, 4, layout=layout) for _ in range(2))
        for spatial in (False, True):
            torch.library.opcheck(ops.feature_distance, (a, b, WEIGHT.clone().requires_grad_(), spatial))
            torch.library.opcheck(ops.feature_distance, (a, b[:1].detach(), None, spatial))


@pytest.mark.parametrize("spatial", [False, True])
def test_gradcheck(spatial):
    a, b = (torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for x, y in ((a, b), (a[:1], b), (a, b[:1])):
        assert torch.autograd.gradcheck(lambda x, y, w: F.feature_distance(x, y, w, spatial=spatial), (x, y, weight))


@pytest.mark.parametrize("mode", ["auto", "triton", "reference"])
def test_zero_vectors(mode):
    """They get no gradient, in every implementation."""
    a, b = tensor(1, 8, 2, 2), tensor(1, 8, 2, 2)
    with torch.no_grad():
        a[:, :, 0, 0] = 0
    with backend.use(mode):
        grads = torch.autograd.grad(F.feature_distance(a, b).sum(), (a, b))
    assert torch.equal(grads[0][:, :, 0, 0], torch.zeros(1, 8))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][:, :, 0, 0].count_nonzero() > 0


def test_double_backward_is_refused():
    a, b = tensor(1, 24, 2, 2), tensor(1, 24, 2, 2)
    (grad,) = torch.autograd.grad(distance(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="feature_distance has no second derivative"):
        grad.sum().backward()


def test_expanded_sliced_and_empty():
    base = torch.randn(2, 48, 1, 9)
    for x in (base.expand(2, 48, 6, 9)[:, ::2], base[:, :24], base[:, ::2, :, ::3], base[:0, ::2]):
        y = torch.randn(x.shape)
        torch.testing.assert_close(distance(x, y), reference.feature_distance(x, y, WEIGHT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "weight", "message"),
    [
        ((8, 4, 4), (8, 4, 4), None, r"a and b must be \(N, C, H, W\) of one size, got \(8, 4, 4\)"),
        ((1, 8, 4, 4), (1, 8, 4, 5), None, r"got \(1, 8, 4, 4\) and \(1, 8, 4, 5\)"),
        ((2, 8, 4, 4), (3, 8, 4, 4), None, "one batch, or one of them a batch of 1"),
        ((2, 8, 4, 4), (2, 8, 4, 4), (7,), r"weight must have shape \(8,\), .* got \(7,\)"),
        ((2, 8, 0, 4), (2, 8, 0, 4), None, "a may be empty in its batch only"),
    ],
)
def test_bad_arguments(a, b, weight, message):
    with pytest.raises(ValueError, match=message):
        F.feature_distance(torch.zeros(a), torch.zeros(b), None if weight is None else torch.zeros(weight))


def test_mixed_dtypes_are_refused():
    a = torch.zeros(1, 8, 2, 2)
    with pytest.raises(RuntimeError, match=r"feature_distance: b is torch\.float16 but a is torch\.float32"):
        F.feature_distance(a, a.half())
    with pytest.raises(RuntimeError, match=r"must be a floating-point tensor, got torch\.int64"):
        F.feature_distance(a.long(), a.long())


# ---- the whole loss


def arguments(net, dtype=torch.float32, size=(35, 33), needs=(True, False), spatial=False, images=2, others=2):
    """Of ops.lpips, with a random trunk."""
    trunk = TRUNKS[net]
    parameters = [torch.randn(shape, dtype=dtype) * (2 / math.prod(shape[1:])) ** 0.5 for shape in trunk.shapes()]
    weights = [torch.rand(c, dtype=dtype) for c in trunk.channels]
    scaling = [torch.rand(1, 3, 1, 1, dtype=dtype) + 0.5 for _ in range(2)]
    image, other = torch.rand(images, 3, *size, dtype=dtype), torch.rand(others, 3, *size, dtype=dtype)
    image.requires_grad_(needs[0])
    other.requires_grad_(needs[1])
    return [image, other, [], scaling, parameters, weights, net, [True, spatial, *needs]]


@pytest.mark.parametrize("net", ["alex", *(pytest.param(net, marks=pytest.mark.slow) for net in ("vgg", "squeeze"))])
def test_opcheck_of_the_whole(net):
    for needs in ((True, False), (True, True), (False, False)):
        torch.library.opcheck(ops.lpips, arguments(net, needs=needs, spatial=needs[1]))
    image, _, _, scaling, parameters, *_ = arguments(net, needs=(False, False))
    torch.library.opcheck(ops.lpips_features, (image, scaling, parameters, net, False))


@pytest.mark.parametrize("spatial", [False, True])
def test_gradcheck_of_the_whole(spatial):
    """In float64, along random directions: a loss of two small images has 6,000 inputs."""
    args = arguments("alex", torch.float64, (31, 31), (True, True), spatial, images=1, others=1)

    def function(image, other):
        return ops.lpips(image, other, *args[2:])[0]

    assert torch.autograd.gradcheck(function, args[:2], fast_mode=True, eps=1e-7, atol=1e-4)


def test_the_whole_refuses_double_backward():
    args = arguments("alex")
    (grad,) = torch.autograd.grad(ops.lpips(*args)[0].sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="lpips has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("net", TRUNKS)
def test_smallest_images(net):
    trunk = TRUNKS[net]
    assert min(min(size) for size in trunk.sizes((trunk.smallest(),) * 2)) == 1
    assert min(min(size) for size in trunk.sizes((trunk.smallest() - 1,) * 2)) < 1

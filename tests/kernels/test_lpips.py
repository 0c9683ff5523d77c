"""The distance of feature maps and its gradient against float64; odd sizes, zero vectors, pools between, mutants."""

import pytest
import torch
import triton
import triton.language as tl
from tolerances import assert_matches

from fastalex import reference
from fastalex.kernels import lpips as module
from fastalex.kernels.lpips import lpips_bwd, lpips_fwd, lpips_images, lpips_images_bwd, tiles_of
from fastalex.kernels.max_pool import max_pool_bwd, max_pool_fwd
from fastalex.kernels.registers import interpreting

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# AlexNet's channels, three tiles of 64 and 128 among them, and channels that fill no tile
CASES = [((2, 64, 5, 7), dtype) for dtype in DTYPES] + [
    (shape, torch.float32)
    for shape in ((1, 192, 3, 5), (1, 384, 3, 3), (2, 256, 2, 3), (1, 100, 3, 3), (3, 3, 4, 5), (2, 1, 3, 3))
]


def maps(shape, dtype=torch.float32, relu=True):
    x = torch.randn(shape)
    return (x.relu() if relu else x).to(dtype).contiguous(memory_format=torch.channels_last)


def truncates(dtype):
    return dtype == torch.bfloat16 and interpreting()


def wide(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def check_forward(a, b, weight, spatial):
    out = lpips_fwd([(a, b, weight)], [a.shape], spatial)
    assert out.dtype == torch.float32
    w = None if weight is None else weight.double()
    expected = reference.feature_distance(a.double(), b.double(), w, spatial=spatial)
    # (u - v)^2 of each channel is at most 4 w, and u and v carry the rounding of their norms
    largest = 1.0 if w is None else w.abs().max().item()
    assert_matches(
        out,
        expected.reshape(out.shape),
        terms=a.shape[1] + (0 if spatial else a.shape[2] * a.shape[3]),
        magnitude=expected.reshape(out.shape) + largest,
    )
    return out


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward(shape, dtype, spatial):
    a, b = maps(shape, dtype), maps(shape, dtype)
    check_forward(a, b, torch.rand(shape[1]), spatial)
    check_forward(a, b, None, spatial)
    check_forward(a, b[:1], torch.rand(shape[1]).to(dtype), spatial)


def expected_gradient(grad, x, y, weight, spatial, above=None, after_relu=True):
    (x_wide,) = wide(x)
    w = None if weight is None else weight.double()
    d = reference.feature_distance(x_wide, y.double(), w, spatial=spatial)
    (gradient,) = torch.autograd.grad(d, x_wide, grad.double().view(d.shape))
    total = gradient if above is None else gradient + above.double()
    return torch.where(x <= 0, 0, total) if after_relu else total


def magnitude_of_gradient(grad, x, weight, spatial, above):
    """|g| / |a| for w (u - v) of at most 2 w, twice for both terms."""
    norm = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    w = 1.0 if weight is None else weight.double().abs().max()
    pixels = 1 if spatial else x.shape[2] * x.shape[3]
    largest = 8 * w * grad.abs().max().double() / pixels * torch.where(norm == 0, 0, 1 / norm)
    return largest.expand(x.shape) + (0 if above is None else above.double().abs())


def check_backward(x, y, weight, spatial, above=None, after_relu=True):
    pixels = x.shape[2] * x.shape[3]
    grad = torch.rand(x.shape[0], pixels if spatial else 1)
    dx = lpips_bwd(grad, x, y, weight, spatial=spatial, above=above, after_relu=after_relu)
    assert dx.dtype == x.dtype
    assert dx.movedim(1, -1).is_contiguous()
    assert_matches(
        dx,
        expected_gradient(grad, x, y, weight, spatial, above, after_relu),
        terms=x.shape[1],
        magnitude=magnitude_of_gradient(grad, x, weight, spatial, above),
        truncates=truncates(x.dtype),
    )
    return dx


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_backward(shape, dtype, spatial):
    x, y = maps(shape, dtype), maps(shape, dtype)
    x[0, :, 1, 1] = 0
    y[0, :, 0, 1] = 0
    check_backward(x, y, torch.rand(shape[1]), spatial, above=maps(shape, dtype, relu=False))
    check_backward(x, y[:1], None, spatial)


def test_without_a_relu_below():
    """Maps of any sign, and no mask."""
    x, y = maps((2, 40, 3, 3), relu=False), maps((2, 40, 3, 3), relu=False)
    check_forward(x, y, torch.rand(40), False)
    check_backward(x, y, torch.rand(40), False, after_relu=False)


@pytest.mark.parametrize(
    ("size", "dtype", "kernel", "stride", "ceil"),
    [
        ((7, 9), torch.float16, 3, 2, False),
        ((6, 8), torch.bfloat16, 3, 2, False),
        ((6, 5), torch.float32, 3, 2, True),
        ((5, 4), torch.float16, 3, 2, True),
        ((6, 8), torch.float16, 2, 2, False),
        ((5, 7), torch.float32, 2, 2, True),
    ],
)
def test_backward_through_a_pool(size, dtype, kernel, stride, ceil):
    """The gathered gradient is that of max_pool_bwd, to the rounding of its result."""
    x, y, weight = maps((2, 48, *size), dtype), maps((2, 48, *size), dtype), torch.rand(48)
    geometry = ((kernel,) * 2, (stride,) * 2, (0, 0), (1, 1))
    pooled, codes = max_pool_fwd(x, *geometry, ceil, after_relu=True)
    above = maps(pooled.shape, dtype, relu=False)
    grad = torch.rand(2, 1)
    dx = lpips_bwd(grad, x, y, weight, above=above, codes=codes, window=(kernel, stride), after_relu=True)
    through = max_pool_bwd(above.float(), codes, size, *geometry)
    assert_matches(
        dx,
        expected_gradient(grad, x, y, weight, False, through),
        terms=48 + 4,
        magnitude=magnitude_of_gradient(grad, x, weight, False, through),
        truncates=truncates(dtype),
    )
    assert through.count_nonzero() > 0


def test_several_layers_in_one_buffer():
    """Each layer's distance is that of the layer alone, whatever the others' sizes; so are gradients by columns."""
    shapes = [(2, 64, 9, 11), (2, 192, 4, 5), (2, 256, 4, 5)]
    a, b = [maps(s) for s in shapes], [maps(s) for s in shapes]
    weights = [torch.rand(64), None, torch.rand(256)]
    pairs = list(zip(a, b, weights, strict=True))
    together, spread = lpips_fwd(pairs, shapes), lpips_fwd(iter(pairs), shapes, True)
    assert together.shape == (2, 3)
    assert spread.shape == (2, 99 + 20 + 20)
    first = 0
    grad, map_grad = torch.rand(2, 3), torch.rand(2, 139)
    for layer, (x, y, w) in enumerate(pairs):
        pixels = x.shape[2] * x.shape[3]
        torch.testing.assert_close(together[:, layer], lpips_fwd([(x, y, w)], [x.shape])[:, 0], rtol=1e-6, atol=0)
        assert torch.equal(spread[:, first : first + pixels], lpips_fwd([(x, y, w)], [x.shape], True))
        alone = lpips_bwd(grad[:, layer : layer + 1].contiguous(), x, y, w)
        assert torch.equal(lpips_bwd(grad, x, y, w, first=layer), alone)
        alone = lpips_bwd(map_grad[:, first : first + pixels].contiguous(), x, y, w, spatial=True)
        assert torch.equal(lpips_bwd(map_grad, x, y, w, first=first, spatial=True), alone)
        first += pixels


def test_both_images_of_one_batch():
    """Maps of both images in one tensor, each compared with the other's half."""
    x, weight, grad = maps((6, 64, 3, 4)), torch.rand(64), torch.rand(3, 1)
    both = lpips_bwd(grad, x, x, weight, shift=3)
    assert torch.equal(both[:3], lpips_bwd(grad, x[:3], x[3:], weight))
    assert torch.equal(both[3:], lpips_bwd(grad, x[3:], x[:3], weight))


def test_zero_vectors_have_no_gradient():
    x, y = maps((1, 64, 2, 2)), maps((1, 64, 2, 2))
    x[:, :, 0] = 0
    dx = lpips_bwd(torch.ones(1, 1), x, y, None)
    assert torch.equal(dx[:, :, 0], torch.zeros(1, 64, 2))
    assert dx[:, :, 1].count_nonzero() > 0
    assert torch.equal(lpips_fwd([(x * 0, x * 0, None)], [x.shape]), torch.zeros(1, 1))


def test_nan_and_infinity_arrive():
    x, y = maps((2, 64, 3, 3)), maps((2, 64, 3, 3))
    x[0, 3, 1, 1] = torch.nan
    assert lpips_fwd([(x, y, None)], [x.shape]).isnan().flatten().tolist() == [True, False]
    spread = lpips_fwd([(x, y, None)], [x.shape], True).view(2, 3, 3).isnan()
    assert spread.nonzero().tolist() == [[0, 1, 1]]
    dx = lpips_bwd(torch.ones(2, 1), x, y, None, after_relu=True)
    assert dx[0, 3, 1, 1].isnan()
    assert dx.isnan().any(1).nonzero().tolist() == [[0, 1, 1]]
    y[1, 0, 0, 0] = torch.inf
    assert lpips_fwd([(x, y, None)], [x.shape]).isnan().all()


@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[:, :, 1:], lambda x: x.transpose(2, 3), lambda x: x.contiguous()]
)
def test_strided_views(view):
    base = [maps((2, 48, 4, 4)) for _ in range(3)]
    x, y, above = (view(t) for t in base)
    check_forward(x, y, torch.rand(x.shape[1]), False)
    check_backward(x, y, torch.rand(x.shape[1]), False, above)


def test_two_runs_are_equal_to_the_bit():
    a, b = maps((2, 64, 17, 19)), maps((2, 64, 17, 19))
    assert torch.equal(lpips_fwd([(a, b, None)], [a.shape]), lpips_fwd([(a, b, None)], [a.shape]))
    grad = torch.rand(2, 1)
    assert torch.equal(lpips_bwd(grad, a, b, None), lpips_bwd(grad, a, b, None))


def test_no_images():
    a = torch.zeros(0, 8, 3, 3)
    assert lpips_fwd([(a, a, None)], [a.shape]).shape == (0, 1)
    assert lpips_fwd([(a, a, None)], [a.shape], True).shape == (0, 9)
    assert lpips_bwd(torch.zeros(1, 1), a, torch.zeros(1, 8, 3, 3), None).shape == a.shape


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_images(layout, dtype, normalize):
    images = torch.rand(2, 3, 19, 23).contiguous(memory_format=layout)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    out = torch.full((2, 19, 23, 3), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    lpips_images(images, shift, scale, normalize, out)
    x = images.double() * (2 if normalize else 1) - (1 if normalize else 0)
    expected = (x - shift.double().view(3, 1, 1)) / scale.double().view(3, 1, 1)
    assert_matches(out, expected, magnitude=expected.abs() + 5, truncates=truncates(dtype))
    grad = torch.full_like(images, torch.nan)
    lpips_images_bwd(out, scale, normalize, grad)
    assert_matches(grad, out.double() * (2 if normalize else 1) / scale.double().view(3, 1, 1))


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(64, (2, 32)), (192, (3, 64)), (384, (3, 128)), (256, (2, 128)), (512, (2, 256)), (100, (2, 64)), (1, (1, 1))],
)
def test_tiles(channels, expected):
    assert tiles_of(channels) == expected


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), r"a must have 4 dimensions \(N, C, H, W\), got shape \(2, 3\)"),
        (torch.zeros(1, 2, 3, 3).double(), torch.zeros(1, 2, 3, 3), "a must be float16, .* got torch.float64"),
        (torch.zeros(2, 2, 3, 3), torch.zeros(3, 2, 3, 3), r"do not fit together: \(2, 2, 3, 3\) and \(3, 2, 3, 3\)"),
        (torch.zeros(1, 16385, 1, 1), torch.zeros(1, 16385, 1, 1), "16384 channels at most, got 16385"),
    ],
)
def test_refusals(a, b, message):
    with pytest.raises(ValueError, match=message):
        lpips_fwd([(a, b, None)], [a.shape])


def test_refusals_of_what_comes_from_above():
    x, grad = maps((1, 8, 4, 4)), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"above has shape \(1, 8, 2, 2\), the map \(1, 8, 4, 4\)"):
        lpips_bwd(grad, x, x, None, above=x[:, :, :2, :2])
    with pytest.raises(ValueError, match=r"codes \(1, 4, 2, 2\) do not fit the map"):
        lpips_bwd(grad, x, x, None, above=x[:, :4, :2, :2], codes=x[:, :4, :2, :2].char())


@triton.jit
def half_of_the_products(x, y, TILES: tl.constexpr):
    return tl.sum(x[0] * y[0], 1)[:, None]


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the helpers that it was compiled with")
def test_a_forgotten_tile_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "row_products", half_of_the_products)
    x, y = maps((1, 192, 3, 3)), maps((1, 192, 3, 3))
    with pytest.raises(AssertionError, match="elements differ"):
        check_forward(x, y, None, False)
    with pytest.raises(AssertionError, match="elements differ"):
        check_backward(x, y, None, False)


@pytest.mark.parametrize("wrong", ["mask", "above", "window"])
def test_mutants_of_the_backward_are_noticed(wrong, monkeypatch):
    x, y = maps((2, 64, 4, 4)), maps((2, 64, 4, 4))
    above = maps((2, 64, 4, 4), relu=False)
    whole = lpips_bwd

    def mutant(grad, x, y, weight, **options):
        if wrong == "mask":
            options["after_relu"] = False
        elif wrong == "above":
            options["above"] = None
        else:
            grad = grad * 1.001
        return whole(grad, x, y, weight, **options)

    monkeypatch.setitem(globals(), "lpips_bwd", mutant)
    with pytest.raises(AssertionError, match="elements differ"):
        check_backward(x, y, None, False, above)

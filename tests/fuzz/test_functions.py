"""Every function of fastalex.functional against torch.nn.functional, on the CPU and by the Triton kernels."""

import contextlib

import pytest
import torch
import torch.nn.functional as TF
from fuzz_cases import DTYPES, assert_same, examples, forked, in_form, values
from hypothesis import assume, given
from hypothesis import strategies as st

from fastalex import backend, reference
from fastalex import functional as F
from fastalex.gpu import dispatch
from fastalex.kernels.geometry import dense

MODES = ["auto", "triton"]
# of sums of gradients, in parts of the largest: torch itself sums halves in several steps
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
small = st.integers(1, 4)
forms = st.integers(0, 11)
pairs = lambda low, high: st.one_of(  # noqa: E731
    st.integers(low, high).map(lambda n: (n, n)), st.tuples(st.integers(low, high), st.integers(low, high))
)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Everything is called once before children are forked, which would import and compile it each for themselves."""
    x, weight = torch.randn(1, 8, 7, 7, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    for mode in MODES:
        with backend.use(mode):
            for norm in (None, F.ResponseNorm(5)):
                F.conv2d_relu_max_pool2d(x, weight, norm=norm).sum().backward()
            (
                F.conv2d_relu(x, weight).sum() + F.linear_relu_dropout(x, weight[0, 0, :, :1].expand(3, 7), p=0.0).sum()
            ).backward()


def dtypes(mode):
    return st.sampled_from(DTYPES if mode == "auto" else DTYPES[:3])


def gradients(output, inputs, grad):
    """Of those inputs that are there; a sum where one is a view that repeats itself would be torch's, not ours."""
    return torch.autograd.grad(output, [t for t in inputs if t is not None], grad)


def attempt(function, *args, **kwargs):
    """The result, or the exception that says no."""
    try:
        return function(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        return error


def compare(ours, theirs, inputs, grad_values, dtype, *, exact=True, floor=0.0, packed=dense, leaks=False):
    """Forward and gradients of `ours` on `inputs` against `theirs` on packed copies; a refusal for a refusal.

    The copies keep their layout: where an infinity meets padding, torch's algorithm decides about NaN.
    `leaks`: torch's algorithm lets NaN into neighbouring elements, other ones in other layouts.  Then ours is NaN where
    float64's is, and equal where neither is.
    """
    mine = [t if t is None else t.detach().requires_grad_() for t in inputs]
    copies = [t if t is None else packed(t.detach()).clone() for t in inputs]
    copies = [t if t is None else t.requires_grad_() for t in copies]
    expected = attempt(theirs, *copies)
    got = attempt(ours, *mine)
    if isinstance(expected, Exception):
        assert isinstance(got, Exception), f"torch refuses: {expected}"
        return
    if isinstance(got, Exception):
        raise AssertionError(f"torch computes {tuple(expected.shape)}") from got
    rounding = ROUNDING[dtype]
    assert got.dtype == dtype
    if leaks and not torch.equal(got.isnan(), expected.isnan()):
        nowhere = theirs(*(t if t is None else t.detach().double() for t in copies)).isnan()
        assert got.isnan()[nowhere].all(), "NaN is lost"
        either = got.isnan() | expected.isnan()
        assert_same(got.masked_fill(either, 0), expected.masked_fill(either, 0), 0.0 if exact else rounding, "forward")
        return
    assert_same(got, expected, 0.0 if exact else rounding, "forward")
    with torch.no_grad():
        assert_same(attempt(ours, *inputs), expected, 0.0 if exact else rounding, "inference")
    if not expected.requires_grad:
        return
    grad = grad_values.tensor(tuple(expected.shape), dtype)
    wanted = gradients(expected, copies, grad.to(expected.dtype))
    names = [name for name, t in zip(("input", "weight", "bias"), copies, strict=False) if t is not None]
    for name, a, b in zip(names, gradients(got, mine, grad), wanted, strict=True):
        assert a.dtype == dtype
        assert_same(a, b, rounding, f"gradient of {name}", floor)


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, features = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    window, size = draw(pairs(1, 5)), draw(pairs(1, 14))
    geometry = {"stride": draw(pairs(1, 4)), "padding": draw(pairs(0, 3)), "dilation": draw(pairs(1, 3))}
    geometry = {name: in_form(value, draw(forms)) for name, value in geometry.items()}
    text = draw(st.sampled_from([None, None, None, "same", "valid"]))
    if text:
        geometry["padding"] = text
    geometry["groups"] = groups
    batch = draw(st.sampled_from([1, 1, 2, 3, 0, None]))
    shape = (channels, *size) if batch is None else (batch, channels, *size)
    return shape, (features, channels // groups, *window), geometry


tensors = st.tuples(values(), values(), st.one_of(st.none(), values()), values(special=False))


def drawn(tensors, shape, weight_shape, dtype):
    x, weight, bias, grad = tensors
    bias = None if bias is None else bias.tensor(weight_shape[:1], dtype)
    return [x.tensor(shape, dtype), weight.tensor(weight_shape, dtype, 1), bias], grad


@pytest.mark.parametrize("mode", MODES)
@examples(45)
@given(st.data())
def test_conv2d_relu(mode, data):
    dtype, (shape, weight_shape, geometry) = data.draw(dtypes(mode)), data.draw(convolutions())
    inputs, grad = drawn(data.draw(tensors), shape, weight_shape, dtype)

    def theirs(x, w, b):
        # as torch computes it without dying; pictures without a batch are none to the geometry
        single = x.dim() == 3
        # with the strides of a batch of one, at which torch looks to choose an algorithm
        x, geometry_, groups = F._conv2d_geometry(dense(x[None]) if single else x, w, *arguments)
        y = TF.conv2d(x, w, b, *geometry_, groups).relu()
        return y[0] if single else y

    arguments = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]

    def check():
        with backend.use(mode), without_blocks(inputs):
            ours = lambda x, w, b: F.conv2d_relu(x, w, b, **geometry)  # noqa: E731
            compare(ours, theirs, inputs, grad, dtype, packed=as_batch, leaks=leaks(inputs))

    forked(check)


def leaks(inputs):
    """oneDNN pairs the channels of bfloat16: it multiplies what lies behind an odd one in memory by 0."""
    return inputs[0].dtype == torch.bfloat16 and inputs[1].shape[1] % 2 == 1


def as_batch(t):
    """Packed; a picture without a batch as a batch of one is."""
    return dense(t[None])[0] if t.dim() == 3 else dense(t)


@contextlib.contextmanager
def without_blocks(inputs):
    """Space to depth multiplies what a window leaves out of its blocks by zero, and a NaN there reaches it."""
    if all(t is None or t.isfinite().all() for t in inputs):
        yield
    else:
        with dispatch.force("conv2d_relu", "library"), dispatch.force("conv2d_weight_grad", "library"):
            yield


@pytest.mark.parametrize("mode", MODES)
@examples(30)
@given(st.data())
def test_linear_relu(mode, data):
    dtype, (features, inputs) = data.draw(dtypes(mode)), data.draw(st.tuples(st.integers(1, 9), st.integers(0, 20)))
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=3)), inputs)
    tensors_, grad = drawn(data.draw(tensors), shape, (features, inputs), dtype)

    def check():
        with backend.use(mode):
            ours = lambda x, w, b: F.linear_relu_dropout(x, w, b, p=0.0)  # noqa: E731
            compare(ours, lambda x, w, b: TF.relu(TF.linear(x, w, b)), tensors_, grad, dtype)

    forked(check)


@st.composite
def windows(draw, plain=False):
    """Arguments of a pooling, as torch takes them or refuses them."""
    found = {"kernel_size": in_form(draw(pairs(1, 4)), draw(forms))}
    stride = draw(st.one_of(st.none(), pairs(1, 4)))
    if stride is not None or draw(st.booleans()):
        found["stride"] = draw(st.sampled_from([None, []])) if stride is None else in_form(stride, draw(forms))
    if plain:
        return found
    for name, low, high in (("padding", 0, 2), ("dilation", 1, 3)):
        if draw(st.booleans()):
            found[name] = in_form(draw(pairs(low, high)), draw(forms))
    found["ceil_mode"] = draw(st.booleans())
    return found


@st.composite
def maps(draw, smallest=1):
    shape = draw(st.sampled_from([1, 2, 3, 0])), draw(st.sampled_from([1, 1, 2, 3, 5, 8, 16, 24])), *draw(pairs(1, 12))
    return shape


def every_window_holds_a_pixel(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Of the windows that torch takes; as small a map as a dilated window's hole may lie between its cells."""
    ones = torch.ones(1, 1, *x.shape[-2:])
    found = attempt(TF.max_pool2d, ones, kernel_size, stride, padding, dilation, ceil_mode)
    return isinstance(found, Exception) or bool(found.isfinite().all())


def by_formula(x, *args, **kwargs):
    y = reference.max_pool2d(x if x.dim() == 4 else x[None], *args, **kwargs)
    return y if x.dim() == 4 else y[0]


@pytest.mark.parametrize("mode", MODES)
@examples(60)
@given(st.data())
def test_max_pool2d(mode, data):
    dtype, shape, arguments = data.draw(dtypes(mode)), data.draw(maps()), data.draw(windows())
    if data.draw(st.integers(0, 5)) == 0:
        shape = shape[1:]
    x, grad = data.draw(values()).tensor(shape, dtype, 1), data.draw(values(special=False))
    # torch's index of a window that holds no pixel lies outside the map, and its gradient goes there
    theirs = TF.max_pool2d if every_window_holds_a_pixel(x, **arguments) else by_formula
    with backend.use(mode):
        compare(lambda x: F.max_pool2d(x, **arguments), lambda x: theirs(x, **arguments), [x], grad, dtype)
        if theirs is by_formula:
            return
        expected = attempt(TF.max_pool2d, x, **arguments, return_indices=True)
        got = attempt(F.max_pool2d, x, **arguments, return_indices=True)
        if isinstance(expected, Exception):
            assert isinstance(got, Exception)
        elif isinstance(got, Exception):
            raise got
        else:
            assert torch.equal(got[1], expected[1]), f"indices\n{got[1]}\n{expected[1]}"


norms = st.fixed_dictionaries(
    {
        "size": st.integers(1, 9),
        "alpha": st.sampled_from([1e-4, 1.0]),
        "beta": st.sampled_from([0.75, 0.75, 0.5, 1.0, 0.6]),
        "k": st.sampled_from([1.0, 2.0]),
    }
)


@pytest.mark.parametrize("mode", MODES)
@examples(45)
@given(st.data())
def test_local_response_norm(mode, data):
    dtype, shape, norm = data.draw(dtypes(mode)), data.draw(maps()), data.draw(norms)
    shape = data.draw(st.sampled_from([shape, shape, shape[:3], (*shape[:3], 2, shape[3])]))
    x, grad = data.draw(values()).tensor(shape, dtype), data.draw(values(special=False))
    compute = dtype if dtype == torch.float64 else torch.float32

    with backend.use(mode):
        compare(
            lambda x: F.local_response_norm(x, **norm),
            lambda x: TF.local_response_norm(x.to(compute), **norm).to(dtype),
            [x], grad, dtype, exact=False, floor=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@examples(35)
@given(st.data())
def test_lrn_max_pool2d(mode, data):
    """Against the two operations apart: which of two nearly equal values is the larger is for rounding to say."""
    dtype, shape, norm = data.draw(dtypes(mode)), data.draw(maps()), data.draw(norms)
    window = data.draw(st.one_of(st.just({"kernel_size": 3, "stride": 2}), windows(plain=True)))
    x, grad = data.draw(values()).tensor(shape, dtype), data.draw(values(special=False))
    groups = data.draw(st.sampled_from([g for g in (1, 1, 2, 3) if shape[1] % g == 0]))
    with backend.use(mode):
        compare(
            lambda x: F.lrn_max_pool2d(x, **norm, **{"stride": None, **window}, groups=groups),
            lambda x: F.max_pool2d(F.local_response_norm(x, **norm, groups=groups), **window),
            [x], grad, dtype, exact=False, floor=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@examples(45)
@given(st.data())
def test_stage(mode, data):
    dtype, (shape, weight_shape, geometry) = data.draw(dtypes(mode)), data.draw(convolutions())
    inputs, grad = drawn(data.draw(tensors), shape, weight_shape, dtype)
    assume(mode == "auto" or all(t is None or t.isfinite().all() for t in inputs))  # `lrn_max_pool.backward` says why
    norm = data.draw(st.one_of(st.none(), norms.map(lambda n: F.ResponseNorm(**n))))
    window = data.draw(st.one_of(st.just({"kernel_size": 3, "stride": 2}), windows(plain=True)))
    pool = {"kernel_size": window["kernel_size"], "pool_stride": window.get("stride")}

    def apart(x, w, b):
        y = F.conv2d_relu(x, w, b, **geometry)
        if norm is not None:
            y = F.local_response_norm(y if y.dim() == 4 else y[None], *norm[:4])
            y = y if len(shape) == 4 else y[0]
        return F.max_pool2d(y, **window)

    def check():
        with backend.use(mode):
            ours = lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, **geometry, norm=norm, **pool)  # noqa: E731
            compare(ours, apart, inputs, grad, dtype, exact=norm is None, floor=0.0 if norm is None else 1.0)

    forked(check)

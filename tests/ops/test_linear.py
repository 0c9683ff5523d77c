"""The operator behind linear_relu_dropout."""

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import MODES, check_against_reference, check_citizenship, tensor
from tolerances import assert_matches

from fastalex import backend, ops
from fastalex import functional as F
from fastalex.cpu import linear as linear_on_cpu
from fastalex.ops.linear import LINEAR_RELU


def inputs(dtype=torch.float32):
    return [tensor(3, 5, 12, dtype=dtype), tensor(8, 12, dtype=dtype), tensor(8, dtype=dtype)]


def linear(x, w, b):
    return F.linear_relu_dropout(x, w, b, 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_against_reference(mode):
    tensors = inputs()
    x, w, b = (t.detach().double().abs().requires_grad_() for t in tensors)
    output = torch_functional.linear(x, w, b)
    magnitudes = [output.detach(), *torch.autograd.grad(output, (x, w, b), torch.full_like(output, 5.0))]
    check_against_reference(linear, tensors, terms=15, magnitudes=magnitudes, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout(mode, p):
    """A fraction p is zero, the rest is scaled, backward follows the same choice, and the random state decides it."""
    x, w, b = torch.ones(200, 4), torch.ones(50, 4, requires_grad=True), torch.ones(50, requires_grad=True)
    with backend.use(mode):
        torch.manual_seed(3)
        y = F.linear_relu_dropout(x, w, b, p)
        torch.manual_seed(3)
        again = F.linear_relu_dropout(x, w, b, p)
        other = F.linear_relu_dropout(x, w, b, p)
        grad_w, grad_b = torch.autograd.grad(y.sum(), (w, b))
    assert torch.equal(y, again)
    assert not torch.equal(y, other)
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 5 / (1 - p)))
    # a binomial fraction of 10,000: five standard deviations
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 10_000) ** 0.5)
    torch.testing.assert_close(grad_b, kept.sum(0) / (1 - p))
    torch.testing.assert_close(grad_w, (kept.sum(0) / (1 - p))[:, None].expand(50, 4))


def test_dropping_everything():
    x, w, b = inputs()
    y = F.linear_relu_dropout(x, w, b, 1.0)
    y.sum().backward()
    assert not y.any()
    assert not w.grad.any()


def test_evaluation_drops_nothing():
    x, w, b = inputs()
    expected = torch_functional.relu(torch_functional.linear(x, w, b))
    torch.testing.assert_close(F.linear_relu_dropout(x, w, b, 0.5, training=False), expected)


def test_citizenship():
    check_citizenship(linear, inputs())


def test_opcheck():
    x, w, b = inputs()
    torch.library.opcheck(ops.linear_relu_dropout, (x, w, b, 0.0, None))
    torch.library.opcheck(ops.linear_relu_dropout, (x, w, None, 0.5, torch.tensor([7])))


def test_gradcheck():
    assert torch.autograd.gradcheck(linear, [t.detach().double().requires_grad_() for t in inputs()])


def test_compiled_dropout_changes_from_call_to_call():
    x, w, b = inputs()
    compiled = torch.compile(lambda *t: F.linear_relu_dropout(*t, 0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x, w, b), compiled(x, w, b))


def narrowed(x, w, b, p=0.5):
    """The layer with parameters narrowed by `to`, whose backward widens the gradients."""
    return F.linear_relu_dropout(x.bfloat16(), w.bfloat16(), b.bfloat16(), p)


def in_autocast(x, w, b, p=0.5):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear_relu_dropout(x, w, b, p)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("elements", [1, 40, 2**20])  # blocks of 1, 3 and all 8 rows
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype, elements, mode, monkeypatch):
    """Twice, with other weights and shapes in between, so that a stale buffer would show."""
    monkeypatch.setattr(linear_on_cpu, "BLOCK_ELEMENTS", elements)
    x, w, b = inputs()
    x = x.detach().to(x_dtype).requires_grad_()
    results = []
    for function in (in_autocast, narrowed):
        torch.manual_seed(5)
        with backend.use(mode):
            y = function(x, w, b)
            function(*inputs())
            function(tensor(3, 4), tensor(5, 4), tensor(5)).sum().backward()
            y.backward(torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))
        results.append((y, x.grad, w.grad, b.grad))
        x.grad = w.grad = b.grad = None
    (y, dx, dw, db), (expected, *gradients) = results
    assert y.dtype == torch.bfloat16
    assert [dx.dtype, dw.dtype, db.dtype] == [x_dtype, torch.float32, torch.float32]
    assert torch.equal(y, expected)
    assert torch.equal(dx, gradients[0])
    assert torch.equal(dw, gradients[1])
    # summed in float32 where `narrowed` rounds the sum
    torch.testing.assert_close(db, gradients[2], rtol=2**-8, atol=1e-6)
    rows = torch.linspace(-1, 1, y.numel()).bfloat16().mul(y.flatten() > 0).view(-1, 8)
    if mode == "auto":
        assert_matches(db, 2 * rows.double().sum(0), terms=15, magnitude=2 * rows.double().abs().sum(0))


def test_autocast_keeps_the_parameters_and_no_copies():
    x, w, b = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        in_autocast(x, w, b)
    assert {t.data_ptr() for t in saved if t.dtype == torch.float32} == {w.data_ptr()}
    assert all(t.numel() != w.numel() for t in saved if t.dtype == torch.bfloat16)
    y = in_autocast(x, w, b)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_is_a_citizen():
    x, w, b = inputs()
    check_citizenship(lambda *t: in_autocast(*t, 0.0), [x.detach().bfloat16().requires_grad_(), w, b])
    torch.library.opcheck(ops.linear_relu_dropout, (x.bfloat16(), w, b, 0.5, torch.tensor([7])))


def test_mixed_dtypes():
    x, w, b = inputs()
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32 but input is torch\.bfloat16"):
        F.linear_relu_dropout(x.bfloat16(), w, b)
    with pytest.raises(RuntimeError, match="bias is on meta"):
        in_autocast(x, w, b.to("meta"))
    assert in_autocast(x, w, b.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        F.linear_relu_dropout(x, w, b[1:])


def test_empty_batch():
    _, w, b = inputs()
    y = linear(torch.randn(0, 12), w, b)
    y.sum().backward()
    assert y.shape == (0, 8)


def test_bad_arguments():
    x, w, b = inputs()
    with pytest.raises(ValueError, match=r"p, the dropout probability, must lie in \[0, 1\], got 1.5"):
        F.linear_relu_dropout(x, w, b, 1.5)
    with pytest.raises(ValueError, match=r"got \(3, 5, 12\) and \(8, 11\)"):
        linear(x, w[:, 1:], b)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        linear(x, w, b[1:])


def test_cublaslts_epilogue_is_the_layer():
    """Its values where it runs on a CPU; that it is refused there is another test's."""
    x, w, b = (t.detach() for t in inputs())
    rows = x.reshape(-1, 12)
    found = LINEAR_RELU.candidates["cublaslt_epilogue"].run(rows, w, b)
    torch.testing.assert_close(found, torch_functional.relu(torch_functional.linear(rows, w, b)))

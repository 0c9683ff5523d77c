"""The operator behind linear_relu_dropout."""

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import MODES, check_against_reference, check_citizenship, tensor

from fastalex import backend, ops
from fastalex import functional as F
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

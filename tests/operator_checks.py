"""What every operator must do, whatever it computes: agree with the reference, and be a good PyTorch citizen."""

import torch
from tolerances import assert_matches

from fastalex import backend

MODES = ("auto", "triton")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def tensor(*shape, dtype=torch.float32, layout=torch.contiguous_format, scale=1.0):
    """Normal values in this dtype and layout, requiring a gradient."""
    values = (torch.randn(shape) * scale).to(dtype)
    return values.contiguous(memory_format=layout).requires_grad_()


def check_against_reference(function, inputs, *, terms, magnitudes=None, mode="auto"):
    """Output and gradients of `function` under `mode`, against the same call on float64 copies under "reference".

    `terms` and `magnitudes` (of the output and of each input's gradient) are `assert_matches`'s.
    """
    with backend.use(mode):
        output = function(*inputs)
        grad = torch.randn_like(output)
        grads = torch.autograd.grad(output, inputs, grad)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    with backend.use("reference"):
        expected = function(*wide)
        expected_grads = torch.autograd.grad(expected, wide, grad.double())
    assert output.dtype == inputs[0].dtype
    results = zip((output, *grads), (expected, *expected_grads), magnitudes or [None] * (len(inputs) + 1), strict=True)
    for actual, wanted, magnitude in results:
        assert_matches(actual.detach(), wanted.detach(), terms=terms, magnitude=magnitude)


def check_citizenship(function, inputs):
    """Layout kept, fullgraph compilation forward and backward equal to eager, vmap, and no second derivative."""
    output = function(*inputs)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, grad, retain_graph=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled_output = compiled(*inputs)
    assert torch.equal(compiled_output, output)
    assert compiled_output.stride() == output.stride()
    for a, b in zip(torch.autograd.grad(compiled_output, inputs, grad), grads, strict=True):
        assert torch.equal(a, b)

    again = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))  # bit-equal

"""torch.compile, and the short way of a call when nothing compiles.  Single operators: tests/ops."""

import pytest
import torch
from calls import CALLS, IMAGES, inputs, network, outputs_and_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """Names of the operators that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_is_the_registered_operator(name):
    """Equal to the bit, forward and backward; only where somebody watches the operator is seen."""
    function, _ = CALLS[name]
    tensors = inputs(name)
    short = outputs_and_gradients(function, tensors)
    assert "GeneratedBackwardFor" not in function(*tensors).grad_fn.name()
    with Calls() as seen:
        registered = outputs_and_gradients(function, tensors)
        assert "GeneratedBackwardFor_fastalex" in function(*tensors).grad_fn.name()
    assert {n.endswith("_backward.default") for n in seen.names if n.startswith("fastalex.")} == {True, False}
    for a, b in zip(short, registered, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    with torch.no_grad():
        assert torch.equal(function(*tensors), short[0])


class Labelled(torch.Tensor):
    """A subclass that counts on __torch_function__ to come back."""


@pytest.mark.parametrize("name", CALLS)
def test_subclasses_and_meta_tensors_see_the_operator(name):
    function, _ = CALLS[name]
    first, *rest = inputs(name)
    output = function(first.as_subclass(Labelled), *rest)
    assert type(output) is Labelled
    assert torch.equal(output.as_subclass(torch.Tensor), function(first, *rest))
    assert function(*(t.to("meta") for t in (first, *rest))).shape == output.shape


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_refuses_a_second_derivative(name):
    function, _ = CALLS[name]
    tensors = inputs(name)
    (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastalex\.\w+ has no second derivative"):
        grad.sum().backward()


def train_step(model, images):
    loss = model(images).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_model_in_one_graph_for_every_batch(dynamic):
    """Left to itself, Dynamo compiles for the first batch size, and then once more for all others."""
    model, counter = network(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    counts = []
    for batch in (4, 3, 7, 12):
        images = torch.randn(batch, *IMAGES[1:])
        if dynamic:
            torch._dynamo.mark_dynamic(images, 0)
        for a, b in zip(train_step(compiled, images), train_step(model, images), strict=True):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2


def test_dropout_and_modes():
    """Training and evaluation are two graphs, and training draws anew in each call."""
    model = network(dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(IMAGES)
    assert not torch.equal(compiled(images), compiled(images))
    model.eval()
    torch.testing.assert_close(compiled(images), model(images))


def test_under_autocast():
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(images), compiled(images)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    """On a CPU reduce-overhead has no graph to capture; that it compiles and is right is what can be seen."""
    model = network()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    images = torch.randn(IMAGES)
    for _ in range(2):
        for a, b in zip(train_step(compiled, images), train_step(model, images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

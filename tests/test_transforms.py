"""vmap, torch.func, checkpointing, copies and threads."""

import threading

import pytest
import torch
from calls import CALLS, COPIES, IMAGES, inputs, network
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastalex


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error")
def test_vmap(name):
    """Over the first tensor, the parameters shared."""
    function, _ = CALLS[name]
    first, *rest = (t.detach() for t in inputs(name))
    stacked = torch.stack([first, first + 1, -first])
    mapped = vmap(lambda x: function(x, *rest))(stacked)
    torch.testing.assert_close(mapped, torch.stack([function(x, *rest) for x in stacked]))


def test_vmap_of_indices():
    """Also what returns integers."""
    x = torch.randn(3, 2, 4, 9, 9)
    values, places = vmap(lambda x: fastalex.functional.max_pool2d(x, 3, 2, return_indices=True))(x)
    expected = torch.nn.functional.max_pool2d(x.flatten(0, 1), 3, 2, return_indices=True)
    assert torch.equal(values.flatten(0, 1), expected[0])
    assert torch.equal(places.flatten(0, 1), expected[1])


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_and_gradients_per_example(name):
    function, _ = CALLS[name]
    tensors = inputs(name)

    def loss(*t):
        return function(*t).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    plain = [t.detach() for t in tensors]
    for a, b in zip(grad(loss, tuple(range(len(plain))))(*plain), expected, strict=True):
        torch.testing.assert_close(a, b)

    first, *rest = plain
    of_each = vmap(grad(lambda x: loss(x[None], *rest)))(first)
    torch.testing.assert_close(of_each, expected[0])
    if rest:  # per-example gradients of a shared weight add up to its gradient
        of_each = vmap(grad(lambda w, x: loss(x[None], w, *rest[1:])), (None, 0))(rest[0], first)
        torch.testing.assert_close(of_each.sum(0), expected[1])


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    function, _ = CALLS[name]
    first, *rest = (t.detach() for t in inputs(name))

    def loss(x):
        return function(x, *rest).square().sum()

    with pytest.raises(RuntimeError, match=r"fastalex\.\w+ has no second derivative"):
        grad(lambda x: grad(loss)(x).sum())(first)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_not_wrong(name):
    function, _ = CALLS[name]
    tensors = tuple(t.detach() for t in inputs(name))
    tangents = tuple(torch.ones_like(t) for t in tensors)
    with pytest.raises(RuntimeError, match=r"fastalex\.\w+ has no forward-mode derivative; .*use\(\"reference\"\)"):
        jvp(function, tensors, tangents)
    with fastalex.backend.use("reference"):
        _, tangent = jvp(function, tensors, tangents)
    assert tangent.abs().max() > 0


def test_functional_call():
    model = network()
    images = torch.randn(IMAGES)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = functional_call(model, parameters, (images,))
    assert torch.equal(output, model(images))
    output.sum().backward()
    assert all(p.grad is not None for p in parameters.values())
    assert all(p.grad is None for p in model.parameters())
    ensemble = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
    both = vmap(lambda p: functional_call(model, p, (images,)))(ensemble)
    torch.testing.assert_close(both[0], output.detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """The same loss and gradients, with dropout drawn again as it was drawn the first time."""
    model = network(dropout=0.5)
    images = torch.randn(IMAGES).requires_grad_()
    results = []
    for wrapped in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        loss = wrapped(images).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    model = network().eval()
    twin = COPIES[how](model)
    images = torch.randn(IMAGES)
    assert torch.equal(twin(images), model(images))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(images), model(images))


@pytest.mark.parametrize("fused", [False, True])
def test_threads(fused):
    """Four threads share a model; each gets the gradients that it gets alone."""
    model = network()
    if fused:
        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.LocalResponseNorm(5), torch.nn.MaxPool2d(3, 2)]
        model = fastalex.fuse(torch.nn.Sequential(*layers))
    images = torch.randn(4, *IMAGES)

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    alone = [gradients(x) for x in images]
    together = [None] * len(images)

    def work(i):
        for _ in range(5):
            together[i] = gradients(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

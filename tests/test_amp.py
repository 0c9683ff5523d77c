"""Autocast and GradScaler: dtypes as `fastalex.functional` documents them."""

import pytest
import torch
from calls import CALLS, IMAGES, IN_AUTOCAST_DTYPE, inputs, network
from torch._subclasses.fake_tensor import FakeTensorMode

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def autocast_on_cuda():
    """Turns autocast on for CUDA tensors without a GPU, which torch.autocast refuses to do."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def turn_on(dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)

    yield turn_on
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("input_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CALLS)
def test_dtypes(name, dtype, input_dtype):
    """Convolution and linear layer run in autocast's dtype, LRN and pooling in their input's; gradients fit leaves."""
    function, _ = CALLS[name]
    tensors = inputs(name, input_dtype)
    with torch.autocast("cpu", dtype):
        output = function(*tensors)
    expected = dtype if name in IN_AUTOCAST_DTYPE else input_dtype
    assert output.dtype == expected
    assert torch.equal(output, function(*(t.to(expected) for t in tensors)))
    output.float().sum().backward()
    assert [t.grad.dtype for t in tensors] == [input_dtype] * len(tensors)


@pytest.mark.parametrize("name", CALLS)
def test_double_is_left_alone(name):
    function, _ = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*inputs(name, torch.float64)).dtype == torch.float64


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of torch")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CALLS)
def test_dtypes_on_cuda(name, dtype, autocast_on_cuda):
    function, _ = CALLS[name]
    with FakeTensorMode():
        tensors = inputs(name, device="cuda")
        assert function(*tensors).dtype == torch.float32
        autocast_on_cuda(dtype)
        output = function(*tensors)
    assert output.is_cuda
    assert output.dtype == (dtype if name in IN_AUTOCAST_DTYPE else torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_the_model(dtype):
    """Near its float32 self: seven layers with sums of at most 72 terms, each rounded to `dtype`."""
    model = network()
    images = torch.randn(IMAGES)
    with torch.autocast("cpu", dtype):
        output = model(images)
    expected = model(images)
    assert output.dtype == dtype
    error = (output - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_grad_scaler():
    """The unscaled float16 gradients train; a step with an infinite gradient is skipped and halves the scale."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    images, labels = torch.randn(IMAGES), torch.arange(IMAGES[0])

    def step(factor=1.0):
        with torch.autocast("cpu", torch.float16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    losses = [step() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert scaler.get_scale() == 256.0
    before = [p.clone() for p in model.parameters()]
    step(float("inf"))
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

"""What a CUDA graph, and a process with several GPUs, ask of the host code around the kernels; without a GPU.

The operators run on fake CUDA tensors with launches that do nothing: their host code is the one that a GPU would see,
while a fake tensor has no values to read.
"""

import contextlib
import sys

import pytest
import torch
from calls import CALLS, CONV, IMAGES, network
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import fastalex
from fastalex import functional as F
from fastalex.data.augmentation import augment
from fastalex.data.preprocessing import Preprocessing
from fastalex.gpu import dispatch
from fastalex.ops import common

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of torch"),
    # a kernel's launcher asks for the alignment of its pointers, which fake tensors answer with a warning
    pytest.mark.filterwarnings("ignore:Accessing the data pointer"),
]

DEVICE = torch.device("cuda", 1)
DROPOUT = {"dropout": (lambda x, w, b: F.linear_relu_dropout(x, w, b, 0.5), CALLS["linear_relu_dropout"][1])}


class StaysOnTheDevice(TorchDispatchMode):
    """Raises where a CUDA tensor is copied to the host, or the host's to the device: both make a capture fail."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        devices = {t.device.type for t in [*args, result] if isinstance(t, torch.Tensor)}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(devices) > 1:
            raise RuntimeError(f"{func} between devices")
        return result


@pytest.fixture
def launches(monkeypatch):
    """The device that was current at each launch; kernels do nothing, and there are two GPUs that do not exist."""
    current, seen = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def device(index):
        current.append(torch.device(index))
        yield
        current.pop()

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **kwargs: seen.append(current[-1]), raising=False)
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *a, **k: self.run(*a, **k), raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(common, "is_watched", lambda args: False)
    dispatch.forget()  # choices made while nothing was captured
    return seen


class Context:
    """Stands for the autograd node, so that backward runs here and not in the engine's threads for a GPU."""

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


def forward_and_backward(monkeypatch, function, shapes, edit=None, module=F):
    """Runs the call, then the backward function of every operator in it; `module` is the one that calls them."""
    caller, steps = module, []

    def run(op, *args):
        if op.recorded is op:
            return op.plain(*args)
        module = sys.modules[op.plain.__module__]
        output = op.plain(*args)
        context = Context(tuple(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args))
        module._setup_context(context, args, output)
        steps.append((module, context, output))
        return output

    monkeypatch.setattr(caller, "call", run)
    with FakeTensorMode(), StaysOnTheDevice(), torch.no_grad():
        monkeypatch.setattr(F, "_needs_grad", lambda *tensors: True)
        tensors = [torch.empty(shape, device=DEVICE, dtype=torch.float16) for shape in shapes]
        if edit:
            edit(tensors)
        function(*tensors)
        for module, context, output in reversed(steps):
            outputs = output if isinstance(output, tuple) else (output,)
            grads = [torch.empty_like(outputs[0]), *outputs[1:]]
            for tensor, grad in zip(tensors, module._backward(context, *grads), strict=False):
                assert grad.shape == tensor.shape
                assert grad.device == DEVICE


@pytest.mark.parametrize("name", [*CALLS, *DROPOUT])
def test_no_host_reads_and_the_right_device(name, launches, monkeypatch):
    function, shapes = {**CALLS, **DROPOUT}[name]
    forward_and_backward(monkeypatch, function, shapes)
    assert len(launches) >= 2
    assert set(launches) == {DEVICE}


def test_no_host_reads_in_a_model(launches):
    model, options = network(dropout=0.5), {"device": DEVICE, "dtype": torch.float16}
    with FakeTensorMode(), StaysOnTheDevice(), torch.no_grad():
        weights = {n: torch.empty_strided(p.shape, p.stride(), **options) for n, p in model.named_parameters()}
        for training in (True, False):
            output = functional_call(model.train(training), weights, (torch.empty(IMAGES, **options),))
            assert output.device == DEVICE
    assert set(launches) == {DEVICE}


def test_no_host_reads_in_augmentation(launches, monkeypatch):
    """Of pictures that lie on the device, by slots that lie there too."""
    looks = Preprocessing.for_photos(3, 24)
    with FakeTensorMode(), StaysOnTheDevice():
        pictures = torch.empty(40, 32, 32, 3, dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
        indices, seed, labels = (torch.empty(n, dtype=torch.int64, device=DEVICE) for n in (5, 1, 40))
        monkeypatch.setattr(common, "call", lambda op, *args: op.plain(*args))
        found = augment(pictures, indices, seed, looks, dtype=torch.float16, slots=indices, labels=labels)
        assert [tuple(tensor.shape) for tensor in found] == [(5, 3, 24, 24), (5,)]
    assert launches == [DEVICE]


def test_no_host_reads_in_lpips(launches, monkeypatch):
    """Forward and backward, with the gradients of both images."""
    loss = fastalex.LPIPS(pnet_rand=True)
    memory = {
        name: (tensor.shape, tensor.stride()) for name, tensor in [*loss.named_parameters(), *loss.named_buffers()]
    }

    def function(image, target):
        options = {"device": DEVICE, "dtype": torch.float16}
        state = {name: torch.empty_strided(*places, **options) for name, places in memory.items()}
        return functional_call(loss, state, (image, target))

    forward_and_backward(monkeypatch, function, [(2, 3, 40, 40)] * 2, module=sys.modules["fastalex.lpips.model"])
    assert len(launches) >= 20
    assert set(launches) == {DEVICE}


@pytest.mark.parametrize(
    ("sin", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x.cpu(), RuntimeError),
        (lambda x: x.new_empty(3).copy_(torch.ones(3)), RuntimeError),
        (lambda x: torch.ones(3).to(x.device), RuntimeError),
    ],
    ids=["item", "mask", "nonzero", "cpu", "copy", "to"],
)
def test_the_check_notices(sin, error, launches, monkeypatch):
    """Each would break a capture on a GPU; here each breaks the test above."""
    module = sys.modules["fastalex.ops.conv_relu"]
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda x, *rest, **options: (sin(x), forward(x, *rest, **options))[1])
    with pytest.raises(error):
        forward_and_backward(monkeypatch, CALLS["conv2d_relu"][0], CONV)


def test_the_check_notices_a_missing_guard(launches, monkeypatch):
    monkeypatch.setattr(sys.modules["fastalex.ops.conv_relu"], "device_of", lambda input: contextlib.nullcontext())
    forward_and_backward(monkeypatch, CALLS["conv2d_relu"][0], CONV)
    assert set(launches) == {torch.device("cuda", 0)}

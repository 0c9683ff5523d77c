"""Each private thing of PyTorch that `fastalex.private` uses is there and means what it is used for."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fastalex import private


def test_functorch():
    seen = []
    torch.func.grad(lambda x: seen.append(private.functorch_is_active()) or x.sum())(torch.ones(2))
    assert seen == [True]
    assert not private.functorch_is_active()


def test_modes():
    class Mode(private.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    assert not private.a_mode_is_active()
    with Mode():
        assert private.a_mode_is_active()


def test_forward_mode():
    assert not private.forward_mode_is_active()
    with forward_ad.dual_level():
        assert private.forward_mode_is_active()


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *args: None),
        lambda m: m.register_forward_pre_hook(lambda *args: None),
        lambda m: m.register_full_backward_hook(lambda *args: None),
        lambda m: m.register_full_backward_pre_hook(lambda *args: None),
        lambda m: nn.modules.module.register_module_forward_hook(lambda *args: None),
        lambda m: nn.modules.module.register_module_forward_pre_hook(lambda *args: None),
        lambda m: nn.modules.module.register_module_full_backward_hook(lambda *args: None),
        lambda m: nn.modules.module.register_module_full_backward_pre_hook(lambda *args: None),
    ],
)
def test_hooks(register):
    module = nn.Linear(2, 2)
    assert not private.has_hooks(module)
    handle = register(module)
    assert private.has_hooks(module)
    handle.remove()
    assert not private.has_hooks(module)


def test_written_tensors():
    x = torch.zeros(3)
    assert not private.is_written(x)
    x.add_(1)
    assert private.is_written(x)


def test_onednn():
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert private.onednn_computes_in(torch.float32)
    assert not private.onednn_computes_in(torch.float64)
    assert isinstance(private.onednn_computes_in(torch.bfloat16), bool)
    assert isinstance(private.onednn_computes_in(torch.float16), bool)
    assert isinstance(private.has_amx(), bool)
    if torch.backends.mkldnn.is_available():
        assert private.has_onednn_linear()
        torch.testing.assert_close(private.onednn_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_addmm_relu():
    bias, rows, weight = torch.randn(4), torch.randn(3, 5), torch.randn(5, 4)
    assert private.has_addmm_relu()
    torch.testing.assert_close(private.addmm_relu(bias, rows, weight), torch.addmm(bias, rows, weight).relu())


def test_fake_tensors():
    with private.FakeTensorMode() as mode:
        fake = torch.empty(3)
    assert type(fake) is private.FakeTensor
    assert private.detect_fake_mode([fake]) is mode
    assert private.tree_map(lambda n: n + 1, [1, (2, {"a": 3})]) == [2, (3, {"a": 4})]

"""The CPU path against eager PyTorch: one thread, batch 32 unless said.  Every case is checked before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastalex
from fastalex import functional as FF

pytestmark = pytest.mark.usefixtures("one_thread")

NORM = (5, 5e-4, 0.75, 2.0)
SHAPES = [(32, 96, 55, 55), (32, 256, 27, 27)]
IDS = ["96x55x55", "256x27x27"]


def activation(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(memory_format=torch.channels_last)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the maximum."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def with_gradient(operation: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        operation(leaf).backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    return run


@pytest.mark.benchmark(group="lrn")
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_lrn_forward(shape: tuple[int, ...], paired: Any) -> None:
    x = activation(shape)
    close(FF.local_response_norm(x, *NORM), F.local_response_norm(x, *NORM), 1e-6)
    paired(lambda: FF.local_response_norm(x, *NORM), lambda: F.local_response_norm(x, *NORM))


@pytest.mark.benchmark(group="lrn")
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_lrn_forward_backward(shape: tuple[int, ...], paired: Any) -> None:
    x = activation(shape)
    grad = torch.randn_like(x)
    ours = with_gradient(lambda x: FF.local_response_norm(x, *NORM), x, grad)
    peer = with_gradient(lambda x: F.local_response_norm(x, *NORM), x, grad)
    close(ours(), peer(), 1e-6)
    paired(ours, peer, rounds=5)


@pytest.mark.benchmark(group="relu-lrn-pool")
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_relu_lrn_max_pool_forward_backward(shape: tuple[int, ...], paired: Any) -> None:
    """Ours takes the mask of the ReLU from the codes; its own ReLU stands for the convolution's."""
    x = activation(shape)

    def eager(x: Tensor) -> Tensor:
        return F.max_pool2d(F.local_response_norm(torch.relu(x), *NORM), 3, 2)

    grad = torch.randn_like(eager(x))
    ours = with_gradient(lambda x: FF.lrn_max_pool2d(torch.relu(x), *NORM, after_relu=True), x, grad)
    peer = with_gradient(eager, x, grad)
    # An almost-tie may choose another cell: all but a few elements agree.
    difference = (ours() - peer()).abs() > 1e-6 * peer().abs().max()
    assert difference.float().mean() < 1e-4
    paired(ours, peer, rounds=5)


class Eager(nn.Module):
    """The paper's network out of PyTorch's own operations, with a copy of our model's parameters."""

    def __init__(self, model: fastalex.AlexNet) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        layers: list[Any] = [m for m in model.features if isinstance(m, nn.Conv2d)]
        for ours in layers:
            conv = nn.Conv2d(
                ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, ours.padding, groups=ours.groups
            )
            conv.load_state_dict(ours.state_dict())
            self.convs.append(conv.to(memory_format=torch.channels_last))
        self.linears = nn.ModuleList(copy.deepcopy(m) for m in model.classifier if isinstance(m, nn.Linear))
        self.dropout = 0.5
        self.layers = model.variant.convs

    def forward(self, x: Tensor) -> Tensor:
        for conv, layer in zip(self.convs, self.layers, strict=True):
            x = torch.relu_(conv(x))
            if layer.norm:
                x = F.local_response_norm(x, *layer.norm[:4])
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, layer.pool_stride)
        x = x.flatten(1)
        hidden: list[Any] = list(self.linears[:-1])
        for linear in hidden:
            x = F.dropout(torch.relu_(F.linear(x, linear.weight, linear.bias)), self.dropout, self.training)
        return self.linears[-1](x)


def models(training: bool) -> tuple[fastalex.AlexNet, Eager]:
    torch.manual_seed(0)
    ours = fastalex.AlexNet(variant="paper")
    peer = Eager(ours)
    return ours.train(training), peer.train(training)


def images(batch: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)


@pytest.mark.benchmark(group="inference")
@pytest.mark.parametrize("batch", [1, 32])
@torch.no_grad()
def test_inference_fp32(batch: int, paired: Any) -> None:
    ours, peer = models(training=False)
    x = images(batch)
    close(ours(x), peer(x), 1e-5)
    paired(lambda: ours(x), lambda: peer(x), rounds=15 if batch == 1 else 5)


@pytest.mark.benchmark(group="inference")
@pytest.mark.parametrize("batch", [1, 32])
@torch.no_grad()
def test_inference_bf16(batch: int, paired: Any) -> None:
    """A bf16 model of ours against eager autocast; eager LRN refuses bf16 on a CPU."""
    ours, peer = models(training=False)
    ours = ours.to(torch.bfloat16)
    x = images(batch)
    narrow = x.to(torch.bfloat16)

    def run_peer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return peer(x)

    close(ours(narrow).float(), peer(x), 3e-2)
    paired(lambda: ours(narrow), run_peer, rounds=7 if batch == 1 else 4)


@pytest.mark.benchmark(group="training")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_training_step(autocast: bool, paired: Any) -> None:
    """Forward, backward and fused SGD with momentum and weight decay, on both sides."""
    x, labels = images(32), torch.randint(1000, (32,), generator=torch.Generator().manual_seed(2))

    def step(model: nn.Module) -> Callable[[], float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)

        def run() -> float:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return run

    ours, peer = models(training=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        close(ours(x).float(), peer(x).float(), 5e-2 if autocast else 1e-5)
    paired(step(ours.train()), step(peer.train()), rounds=3)

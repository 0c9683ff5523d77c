"""Tools that people point at a torchvision model: what they do with fastalex.AlexNet and with a fused model."""

import copy

import pytest
import torch
from small_models import Plain, narrow
from torch import nn
from torch.nn.modules import module as every_module
from torch.utils.flop_counter import FlopCounterMode

import fastalex
from fastalex import functional as F
from fastalex.variants import VARIANTS


@pytest.fixture
def plain():
    return Plain().eval()


@pytest.fixture(params=["AlexNet", "fused"])
def ours(request, plain):
    if request.param == "fused":
        return fastalex.fuse(plain)
    model = fastalex.AlexNet(4, variant=narrow("torchvision")).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 96)


def every_variant():
    return pytest.mark.parametrize("name", VARIANTS)


@every_variant()
def test_parameters_lie_as_torchs_and_so_do_their_gradients(name):
    model = fastalex.AlexNet(4, variant=narrow(name))
    crop = model.variant.crop
    model(torch.randn(2, 3, crop, crop)).sum().backward()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in model.parameters())
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())
    assert all(p.view(-1).shape == (p.numel(),) for p in model.parameters())


def test_a_channels_last_model_stays_one(images):
    model = fastalex.AlexNet(4, variant=narrow("paper")).to(memory_format=torch.channels_last)
    assert model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    outputs = []
    for m in (model, twin):
        m.eval()
        outputs.append(m(images))
        outputs[-1].sum().backward()
    torch.testing.assert_close(*outputs)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        assert a.grad.stride() == a.stride()


def test_safetensors_files(ours, tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file(ours.state_dict(), tmp_path / "model.safetensors")
    loaded = torch_files.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in ours.state_dict().items())


def test_lbfgs(ours, images):
    optimizer = torch.optim.LBFGS(ours.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ours(images), torch.tensor([1, 2]))
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert closure() < before


def counted(model, images):
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops()


def test_flops_are_torchs(ours, plain, images):
    assert counted(ours, images) == counted(plain, images)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ours(images)
    with torch.no_grad(), FlopCounterMode(display=False) as expected:
        plain(images)
    assert counter.get_total_flops() == expected.get_total_flops()


def test_flops_of_groups_and_norms(images):
    """Every variant's forward pass, as torch counts the same convolutions and products."""
    model = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    apart = copy.deepcopy(model)
    totals = []
    for m, mode in ((model, "auto"), (apart, "reference")):
        with fastalex.backend.use(mode), torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(images)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@every_variant()
def test_symbolic_traces(name):
    model = fastalex.AlexNet(4, variant=narrow(name)).eval()
    traced = torch.fx.symbolic_trace(model)
    for batch in (2, 3):
        x = torch.randn(batch, 3, model.variant.crop, model.variant.crop)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_feature_extraction(ours, plain, images):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = {name.partition(".")[0] for name in extraction.get_graph_node_names(ours)[0][1:]}
    assert {"features", "classifier"} <= names
    # our hidden layers hold their ReLU and their dropout
    layers = ["features.2", "features.12", "classifier.4" if isinstance(ours, fastalex.AlexNet) else "classifier.5"]
    found = extraction.create_feature_extractor(ours, layers)(images)
    expected = extraction.create_feature_extractor(plain, ["features.2", "features.12", "classifier.5"])(images)
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_functions_trace_as_one_call():
    class Model(nn.Module):
        def forward(self, x, w):
            return F.max_pool2d(F.lrn_max_pool2d(F.conv2d_relu(x, w), 5), 2)

    traced = torch.fx.symbolic_trace(Model())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [F.conv2d_relu, F.lrn_max_pool2d, F.max_pool2d]
    x, w = torch.randn(1, 3, 20, 20), torch.randn(8, 3, 3, 3)
    assert torch.equal(traced(x, w), Model()(x, w))


def test_hooks_on_every_module(ours, images):
    expected = ours(images)
    seen = []
    handles = [
        every_module.register_module_forward_hook(lambda module, inputs, output: seen.append(module)),
        every_module.register_module_forward_pre_hook(lambda module, inputs: None),
    ]
    torch._dynamo.reset()  # does not look for hooks that were not there when it compiled a model
    try:
        got = ours(images)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert set(map(id, seen)) == set(map(id, ours.modules()))


def test_jit_traces(images):
    ours = fastalex.AlexNet(4, variant=narrow("torchvision")).eval()
    traced = torch.jit.trace(ours, images)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 96, 96)
        torch.testing.assert_close(traced(x), ours(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 3, 96, 96, requires_grad=True)
    grads = [torch.autograd.grad(m(x).sum(), x)[0] for m in (traced, ours)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

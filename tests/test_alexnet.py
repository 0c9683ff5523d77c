"""The variants: parameters, wiring against torch.nn built by hand, what hooks see and what backward keeps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import Plain, narrow
from torch import nn

import fastalex
from fastalex.functional import ResponseNorm
from fastalex.variants import TORCHVISION, VARIANTS, BatchNorm, Conv, Variant

PARAMETERS = {
    "paper": 60_965_224,
    "code2012": 60_965_224,
    "torchvision": 61_100_840,
    "bvlc_alexnet": 60_965_224,
    "caffenet": 60_965_224,
    "bn": 60_965_224,
}


def by_hand(model, x):
    """The same network in torch.nn.functional, written out from the paper and from Caffe's prototxt files."""
    variant = model.variant
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    linears = [m for m in model.classifier if isinstance(m, nn.Linear)]
    alpha, k, groups = {
        "paper": (5e-4, 2.0, 1),
        "code2012": (1e-4, 2.0, 2),
        "bvlc_alexnet": (1e-4, 1.0, 1),
        "caffenet": (1e-4, 1.0, 1),
        "torchvision": (0.0, 1.0, 1),
        "bn": (0.0, 1.0, 1),
    }[variant.name.removeprefix("narrow ")]

    def norm(t):
        if alpha == 0:
            return t
        return torch.cat([F.local_response_norm(h, 5, alpha, 0.75, k) for h in t.chunk(groups, 1)], 1)

    name = variant.name.removeprefix("narrow ")
    if name == "code2012":
        x = F.pad(x, (0, 3, 0, 3))
    for i, conv in enumerate(convs):
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
        if name == "bn" and i < 4:
            x = F.max_pool2d(F.relu(x), 3, 2) if i < 2 else F.relu(x)
            batch_norm = [m for m in model.features if isinstance(m, nn.BatchNorm2d)][i]
            if model.training:
                mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
            else:
                mean, var = (t[:, None, None] for t in (batch_norm.running_mean, batch_norm.running_var))
            x = (x - mean) / (var + 1e-4).sqrt()
        elif i in (2, 3):
            x = F.relu(x)
        elif i == 4:
            x = F.max_pool2d(F.relu(x), 3, 2)
        elif name == "code2012":
            x = F.relu(F.max_pool2d(norm(x), 3, 2))
        elif name == "caffenet":
            x = norm(F.max_pool2d(F.relu(x), 3, 2, ceil_mode=True))
        else:
            x = F.max_pool2d(norm(F.relu(x)), 3, 2)
    x = x.flatten(1)
    for linear in linears[:2]:
        x = F.relu(F.linear(x, linear.weight, linear.bias))
    return F.linear(x, linears[2].weight, linears[2].bias)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = fastalex.AlexNet(variant=name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_wiring(name, backend):
    """Outputs and gradients in float64 equal those of the network written by hand."""
    model = fastalex.AlexNet(10, variant=narrow(name)).double().eval()
    with torch.no_grad():  # large enough for LRN to matter
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (2.0 / max(p[0].numel(), 1)) ** 0.5)
    x = torch.randn(2, 3, model.variant.crop, model.variant.crop, dtype=torch.float64) * 30
    x.requires_grad_()
    with fastalex.backend.use(backend):
        output = model(x)
        grads = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
    expected = by_hand(model, x)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10 * expected_grad.abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_triton_kernels_run_the_model(name):
    """Forward and backward in float32 through the Triton kernels, against the reference in float64.

    The bound is float32's unit roundoff times the longest sum (the 9216/4 inputs of fc6, then seven layers below it),
    relative to the largest gradient of each tensor.
    """
    model = fastalex.AlexNet(10, variant=narrow(name, divisor=4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (2.0 / max(p[0].numel(), 1)) ** 0.5)
    x = torch.randn(2, 3, 67, 67) * 30
    wide = copy.deepcopy(model).double()
    with fastalex.backend.use("triton"):
        output = model(x)
        grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    with fastalex.backend.use("reference"):
        expected = wide(x.double())
        expected_grads = torch.autograd.grad(expected.square().sum(), list(wide.parameters()))
    bound = 2.0**-24 * 9216 / 4
    for a, b in zip((output, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound * b.abs().max().item())


def test_dropout_positions():
    with torch.device("meta"):
        paper, torchvision = (fastalex.AlexNet(variant=v, dropout=0.3).classifier for v in ("paper", "torchvision"))
    assert (paper[1].p, paper[4].p, type(paper[0])) == (0.3, 0.3, nn.Identity)
    assert (torchvision[0].p, torchvision[1].p, torchvision[4].p) == (0.3, 0.3, 0.0)


def test_initialisation_of_the_paper():
    model = fastalex.AlexNet(10, variant="paper")
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    linears = [m for m in model.classifier if isinstance(m, nn.Linear)]
    assert [c.bias.unique().tolist() for c in convs] == [[0.0], [1.0], [0.0], [1.0], [1.0]]
    assert [m.bias.unique().tolist() for m in linears] == [[1.0], [1.0], [0.0]]
    for layer in convs + linears:
        n = layer.weight.numel()
        assert layer.weight.mean().abs() < 5 * 0.01 / n**0.5
        assert layer.weight.std().item() == pytest.approx(0.01, abs=5 * 0.01 / (2 * n) ** 0.5)


def test_torchvisions_weights_outputs_and_gradients():
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.alexnet(num_classes=20).eval()
    ours = fastalex.AlexNet(20, variant="torchvision").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-4 * q.grad.abs().max().item(), msg=name)


def test_other_image_sizes_average_to_the_classifiers_size():
    model = fastalex.AlexNet(4, variant=narrow("torchvision")).eval()
    assert model(torch.randn(1, 3, 300, 260)).shape == (1, 4)


def test_hooks_see_every_module_and_change_nothing():
    model = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    x = torch.randn(1, 3, 224, 224)
    expected = model(x)
    shapes = {}
    for name, module in model.features.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: shapes.update({name: tuple(o.shape)}))
    torch.testing.assert_close(model(x), expected)
    assert shapes["0"] == shapes["1"] == (1, 12, 55, 55)
    assert shapes["2"] == (1, 12, 27, 27)
    assert len(shapes) == len(model.features)


def saved_bytes(function):
    """What autograd keeps for backward, each piece of memory counted once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, id):
        output = function()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), output


def test_what_the_lrn_stages_keep_for_backward():
    """conv1..pool2 of the paper at most 0.26 of eager PyTorch's bytes, images and weights not counted."""
    model = fastalex.AlexNet(variant="paper")
    x = torch.randn(1, 3, 224, 224)
    first, second = (m for m in model.features if isinstance(m, nn.Conv2d) and m.in_channels in (3, 96))

    def eager():
        y = x
        for conv in (first, second):
            y = F.relu(F.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups))
            y = F.max_pool2d(F.local_response_norm(y, 5, 5e-4, 0.75, 2.0), 3, 2)
        return y

    theirs, expected = saved_bytes(eager)
    ours, output = saved_bytes(lambda: model.features[:6](x))
    torch.testing.assert_close(output, expected)
    parameters = x.nbytes + first.weight.nbytes + second.weight.nbytes
    assert ours - parameters <= 0.26 * (theirs - parameters)


def test_activations_are_channels_last():
    model = fastalex.AlexNet(4, variant=narrow("paper"))
    maps = model.features(torch.randn(2, 3, 224, 224))
    assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", VARIANTS)
def test_features_at(name):
    """What hooks on the ReLUs would see."""
    model = fastalex.AlexNet(4, variant=narrow(name)).eval()
    x = torch.randn(1, 3, 224, 224)
    expected = []
    for module in model.features:
        if isinstance(module, nn.ReLU | fastalex.nn.ConvReLU2d):
            module.register_forward_hook(lambda m, i, o: expected.append(o))
    model(x)
    hooked = tuple(expected)
    found = model.features_at(x, *(f"relu{i}" for i in range(1, 6)))
    assert list(found) == ["relu1", "relu2", "relu3", "relu4", "relu5"]
    for a, b in zip(found.values(), hooked, strict=True):
        torch.testing.assert_close(a, b)
    expected.clear()
    assert list(model.features_at(x, "relu2")) == ["relu2"]
    assert len(expected) == 2  # it went no further
    with pytest.raises(ValueError, match=r"layers must be out of relu1, .*, relu5, got 'conv1'"):
        model.features_at(x, "conv1")


def test_what_features_at_keeps_for_backward():
    """At most 0.8 of what hooks on torchvision's features keep; 2.34 MB against 2.96 per 224x224 image in float32."""
    models = pytest.importorskip("torchvision.models")
    theirs, ours = models.alexnet().eval(), fastalex.AlexNet(variant="torchvision").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    names = [f"relu{i}" for i in range(1, 6)]
    hooked = {}
    for name, i in zip(names, (1, 4, 7, 9, 11), strict=True):
        theirs.features[i].register_forward_hook(lambda m, i, o, name=name: hooked.update({name: o}))
    with_hooks, _ = saved_bytes(lambda: theirs.features(x))
    without, found = saved_bytes(lambda: ours.features_at(x, *names))
    for name in names:
        torch.testing.assert_close(found[name], hooked[name])
    parameters = x.nbytes + sum(p.nbytes for p in ours.features.parameters() if p.dim() > 1)
    assert without - parameters <= 0.8 * (with_hooks - parameters)


def test_copies():
    model = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    x = torch.randn(1, 3, 224, 224)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


def test_a_model_saved_when_the_variants_lay_beside_it():
    """torch.save of a whole model names its classes by their modules."""
    model = fastalex.AlexNet(4, variant=narrow("paper"))
    saved = pickle.dumps(model, protocol=2)
    old = saved.replace(b"cfastalex.variants\n", b"cfastalex.alexnet\n")
    assert old.count(b"cfastalex.alexnet\n") > saved.count(b"cfastalex.alexnet\n")
    assert pickle.loads(old).variant == model.variant


def test_input_of_the_wrong_shape():
    model = fastalex.AlexNet(4, variant=narrow("paper"))
    with pytest.raises(ValueError, match=r"input must be \(N, 3, H, W\), got shape \(1, 1, 224, 224\)"):
        model(torch.randn(1, 1, 224, 224))


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant must be one of paper, code2012, .* got 'vgg'"):
        fastalex.AlexNet(variant="vgg")


def test_custom_variant_is_data():
    tiny = Variant(
        "tiny", (Conv(8, 3, norm=ResponseNorm(3), pool=3), Conv(8, 3)), in_channels=1, hidden=(16, 16), features_size=4
    )
    assert fastalex.AlexNet(5, variant=tiny)(torch.randn(2, 1, 15, 15)).shape == (2, 5)
    assert TORCHVISION.convs[0].norm is None


# ---- images after space-to-depth


def in_blocks(x, padding):
    """Space to depth by 4, written out."""
    (top, bottom), (left, right) = padding
    x = F.pad(x, (left, right, top, bottom))
    return torch.cat([x[:, :, i::4, j::4] for i in range(4) for j in range(4)], 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_images_in_blocks(name):
    """The same outputs and gradients in float64 from images that are padded and regrouped already, hooks or not."""
    model = fastalex.AlexNet(4, variant=narrow(name)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (2.0 / max(p[0].numel(), 1)) ** 0.5)
    crop = model.variant.crop
    for height, width in ((crop, crop), (67, 90)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64) * 30
        blocks = in_blocks(x, model.block_padding(height, width))
        if height == crop:
            assert blocks.shape == (2, 48, 57, 57)
        a, b = model(x), model(blocks)
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * a.abs().max().item())
        weight = model.features[1 if name == "code2012" else 0].weight
        grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (a, b)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10 * grads[0].abs().max().item())
        for layer, maps in model.features_at(x, "relu1", "relu5").items():
            torch.testing.assert_close(model.features_at(blocks, layer)[layer], maps)
    seen = []
    for module in model.features:
        module.register_forward_hook(lambda m, i, o: seen.append(type(m)))
    torch.testing.assert_close(model(blocks), b)
    assert len(seen) == len(model.features) - (name == "code2012")  # without its padding


def test_images_in_blocks_need_a_stride():
    tiny = Variant("tiny", (Conv(8, 3, pool=3),), in_channels=1, hidden=(16, 16), features_size=4)
    model = fastalex.AlexNet(5, variant=tiny)
    with pytest.raises(ValueError, match='variant "tiny" starts with stride 1'):
        model.block_padding(32, 32)
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\), got shape \(1, 16, 8, 8\)$"):
        model(torch.randn(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"got shape \(1, 47, 57, 57\) \(or \(N, 48, H', W'\) after space-to-depth\)"):
        fastalex.AlexNet(4, variant=narrow("paper"))(torch.randn(1, 47, 57, 57))


# ---- no result depends on an earlier call


def with_numpy(weight):
    weight.detach().numpy()[1:4] = 0


def one_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


EDITS = {
    "in place": lambda w: w.mul_(2),
    "copied": lambda w: w.copy_(w * 2),
    "some filters through data": lambda w: w.data[1:4].zero_(),
    "half a filter through data": lambda w: w.data[1:4, ::2].fill_(9),
    "new data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "numpy": with_numpy,
    "optimiser": one_step,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("layer", ["features.0", "features.3", "features.6", "classifier.1", "classifier.6"])
def test_inference_sees_every_edit(layer, edit):
    model, x = fastalex.AlexNet(4, variant=narrow("torchvision")).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            before = model(x)
        edit(model.get_submodule(layer).weight)
        after = model(x)
        expected = copy.deepcopy(model)(x)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_inference_with_other_weights():
    """state_dict, functional_call, a new parameter and a change of dtype all count."""
    model = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    other = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        mine, theirs = model(x), other(x)
        called = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(called, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), mine)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), theirs)
        model.classifier[1].weight = nn.Parameter(torch.zeros_like(model.classifier[1].weight))
        assert not torch.allclose(model(x), theirs)
        model.load_state_dict(other.state_dict())
        wide = model.double()(x.double())
        torch.testing.assert_close(wide.float(), theirs, rtol=1e-4, atol=1e-5)


def test_inference_keeps_a_dropout_that_was_left_on():
    """Monte-Carlo dropout: the model evaluates, its hidden layers still drop."""
    model = fastalex.AlexNet(4, variant=narrow("paper")).eval()
    model.classifier[1].train()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["pixel", "weight", "all weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_arrives_where_torchs_does(dtype, where, value):
    model = fastalex.AlexNet(4, variant=narrow("torchvision")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if where == "pixel":
            x[0, :, 30, 30] = value
        elif where == "weight":
            model.features[3].weight[1, 1, 1, 1] = value
        else:
            model.features[6].weight.fill_(value)
        model, x = model.to(dtype), x.to(dtype)
        theirs = Plain().eval().to(dtype)
        theirs.load_state_dict(model.state_dict())
        assert torch.equal(model(x).isnan(), theirs(x).isnan())
        assert torch.equal(model.features(x).isnan(), theirs.features(x).isnan())


# ---- memory and candidates


@pytest.mark.parametrize(("name", "share"), [("paper", 0.40), ("torchvision", 0.40)])
def test_what_a_training_step_keeps_for_backward(name, share):
    """The whole model at most this share of eager PyTorch's bytes, parameters and images not counted."""
    model = fastalex.AlexNet(variant=name)
    modules = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    x = torch.randn(2, 3, 224, 224)

    def eager():
        y = x
        for conv, data in zip(modules[:5], model.variant.convs, strict=True):
            y = F.relu(F.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups))
            if data.norm:
                y = F.local_response_norm(y, *data.norm[:4])
            if data.pool:
                y = F.max_pool2d(y, data.pool, data.pool_stride)
        y = torch.flatten(y, 1)
        for linear in modules[5:7]:
            if model.variant.dropout_first:
                y = F.relu(F.linear(F.dropout(y), linear.weight, linear.bias))
            else:
                y = F.dropout(F.relu(F.linear(y, linear.weight, linear.bias)))
        return F.linear(y, modules[7].weight, modules[7].bias)

    theirs, _ = saved_bytes(eager)
    ours, _ = saved_bytes(lambda: model(x))
    parameters = x.nbytes + sum(m.weight.nbytes for m in modules)
    assert ours - parameters <= share * (theirs - parameters)


def candidate_variant(name):
    """Narrow, for images of 51x51, with channels that every candidate takes: multiples of 16 per group."""
    variant = VARIANTS[name]
    channels = (32, 32, 96, 32, 32) if name == "paper" else (16, 48, 32, 32, 16)
    convs = [Conv(**{**vars(c), "channels": n}) for c, n in zip(variant.convs, channels, strict=True)]
    convs[4] = Conv(**{**vars(convs[4]), "pool": 2})
    changes = {"name": f"narrow {name}", "convs": tuple(convs), "hidden": (32, 16), "features_size": 1}
    return Variant(**{**vars(variant), **changes})


# algorithm: of the forward pass.  The input gradient's candidate, and conv1's for its weight gradient.
FORCED = {
    "spatial": ("triton", "space_to_depth_library"),
    "batch_tiled": ("triton", "space_to_depth_triton"),
    "descriptors": ("triton_descriptors", "space_to_depth_descriptors"),
    "split_k": ("triton", "space_to_depth_triton"),
}


@pytest.mark.parametrize(
    "algorithm", [pytest.param(f, marks=pytest.mark.slow if f != "spatial" else ()) for f in FORCED]
)
@pytest.mark.parametrize("name", ["paper", "torchvision"])
def test_every_triton_candidate_runs_the_model(name, algorithm):
    """Forward and backward with Triton's convolutions, against the reference in float64."""
    from fastalex.gpu import dispatch
    from fastalex.kernels.registers import interpreting

    if algorithm == "descriptors" and not interpreting():
        pytest.skip("TF32 has other bounds")
    input_grad, conv1_grad = FORCED[algorithm]
    model = fastalex.AlexNet(10, variant=candidate_variant(name)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (2.0 / max(p[0].numel(), 1)) ** 0.5)
    x = torch.randn(2, 3, 51, 51) * 30
    wide = copy.deepcopy(model).double()
    precision = torch.backends.cudnn.conv.fp32_precision
    # the descriptors' gradients refuse exact fp32; the interpreter multiplies exactly all the same
    torch.backends.cudnn.conv.fp32_precision = "tf32" if algorithm == "descriptors" else "ieee"
    try:
        with (
            fastalex.backend.use("triton"),
            dispatch.force("conv2d_relu", f"space_to_depth_{algorithm}", f"triton_{algorithm}"),
            dispatch.force("conv2d_input_grad", input_grad, "triton"),
            dispatch.force("conv2d_weight_grad", conv1_grad, input_grad, "triton"),
        ):
            lines = [line for line in fastalex.choices.explain(model, x).splitlines() if ": conv2d" in line]
            forward = [line for line in lines if ": conv2d_relu by" in line]
            assert [f"by space_to_depth_{algorithm}" in line for line in forward] == [True] + [False] * 4
            assert all(f"by triton_{algorithm}" in line for line in forward[1:])
            assert sum(f"conv2d_input_grad by {input_grad} " in line for line in lines) >= 4
            assert [f"conv2d_weight_grad by {conv1_grad} " in line for line in lines[1::3]] == [True] + [False] * 4
            assert all(f"conv2d_weight_grad by {input_grad} " in line for line in lines[4::3])
            output = model(x)
            grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision
    with fastalex.backend.use("reference"):
        expected = wide(x.double())
        expected_grads = torch.autograd.grad(expected.square().sum(), list(wide.parameters()))
    # unit roundoff of float32 times the longest sum, as in test_triton_kernels_run_the_model
    bound = 2.0**-24 * 9216 / 4
    for a, b in zip((output, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound * b.abs().max().item())


# ---- batch normalisation


def test_batch_normalisation_in_training():
    """By the batch's own statistics, in float64; the running ones move a tenth of the way."""
    model = fastalex.AlexNet(4, 0.0, variant=narrow("bn")).double()
    x = torch.randn(3, 3, 227, 227, dtype=torch.float64).requires_grad_()
    output = model(x)
    parameters = [x, *model.parameters()]
    expected = by_hand(model, x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    grads, wanted = (torch.autograd.grad(y.square().sum(), parameters) for y in (output, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10 * want.abs().max().item())
    first = F.max_pool2d(F.relu(F.conv2d(x, model.features[0].weight, model.features[0].bias, 4)), 3, 2)
    norm = model.features[3]
    torch.testing.assert_close(norm.running_mean, 0.1 * first.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * first.var((0, 2, 3)))
    assert model.features.training
    assert not list(norm.parameters())


def test_convolutions_before_batch_normalisation_are_fused():
    model = fastalex.AlexNet(4, variant=narrow("bn"))
    calls = [name for name, _ in fastalex.choices.operator_calls(model, torch.randn(2, 3, 227, 227))]
    assert calls[:5] == ["conv2d_relu_pool", "conv2d_relu_pool", "conv2d_relu", "conv2d_relu", "conv2d_relu_pool"]


def test_sync_batch_norm_takes_the_place_and_the_weights():
    """As PyTorch converts any model for processes whose own batches are too small; it runs on GPUs only."""
    model = fastalex.AlexNet(4, variant=narrow("bn"))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 4
    assert converted.state_dict().keys() == expected.keys()
    x = torch.randn(1, 3, 227, 227)  # in evaluation nothing is synchronised
    plain = fastalex.AlexNet(4, variant=narrow("bn"))
    plain.load_state_dict(converted.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), converted.eval()(x))


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (BatchNorm(eps=-1.0), "norm.eps must be a finite number of at least 0, got -1.0"),
        (BatchNorm(momentum=2.0), "norm.momentum must be at most 1, got 2.0"),
        ((1e-4, 0.1), "norm must be a ResponseNorm, a BatchNorm or None, got"),
    ],
)
def test_wrong_batch_norms(norm, message):
    with pytest.raises(ValueError, match=message):
        Conv(8, 3, norm=norm)

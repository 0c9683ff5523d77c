"""torch.compile(model, backend="fastalex"), fuse and explain: other people's models keep results and gradients."""

import collections
import contextlib
import copy
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from calls import COPIES
from tolerances import UNIT_ROUNDOFF
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastalex
from fastalex import dynamo

X = (2, 3, 15, 15)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def log(caplog):
    """Reads what the compilations since the last reading reported: [replaced, left], functions without their module."""
    caplog.set_level(logging.INFO, "fastalex")

    def read():
        found = [[], []]
        for message in [record.getMessage() for record in caplog.records if record.name == "fastalex"]:
            for lines, part in zip(found, re.split(r"left \(\d+\):", message), strict=True):
                lines += [line.strip().replace("fastalex.functional.", "") for line in part.splitlines()[1:]]
        caplog.clear()
        return found

    return read


def run(model, x):
    """Outputs, then the gradients of the input and of each parameter that has one."""
    x = x.clone().requires_grad_()
    outputs = model(x)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    pairs = [(y * w).sum() for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    grads = torch.autograd.grad(sum(pairs), wanted, allow_unused=True) if pairs else []
    return [y.detach() for y in outputs] + [g for g in grads if g is not None]


def assert_same(model, fused, x, *, terms=64):
    """Equal outputs and gradients, to the rounding of `terms` additions relative to the largest element.

    The two sides add the same numbers in other orders; each of the layers below contributes fewer than `terms`
    roundings to a result, in units of the dtype that the model computes in.
    """
    expected, actual = run(model, x), run(fused, x)
    assert len(expected) == len(actual)
    for e, a in zip(expected, actual, strict=True):
        assert (e.dtype, e.shape) == (a.dtype, a.shape)
        assert e.stride() == a.stride() or 1 in e.shape
        error = (e - a).abs().max().item() if e.numel() else 0.0
        assert error <= terms * UNIT_ROUNDOFF[e.dtype] * e.abs().max().item(), f"{error} in {tuple(e.shape)}"


class Net(nn.Module):
    """One layer of each kind, and a forward that is given."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, (2, 3), padding="same", bias=False)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(15, 15)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.norm, self.pool, self.drop = nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0), nn.MaxPool2d(3, 2), nn.Dropout(0.0)
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.body = body

    def forward(self, x):
        return self.body(self, x)


CONV, RELU, NORM, POOL = "conv (Conv2d)", "relu (ReLU)", "norm (LocalResponseNorm)", "pool (MaxPool2d)"
TWO_USERS = f"{CONV}: its output has 2 users"


def two_users(n, x):
    y = n.conv(x)
    return n.relu(y), y + 1


def written_into(n, x):
    y = n.conv(x)
    F.relu_(y)
    return y * 2


def copied_before(n, x):
    y = n.conv(x)
    z = y + 1
    return F.relu_(y), z


def activation_returned(n, x):
    y = n.relu(n.conv(x))
    return y, n.pool(n.norm(y))


def used_twice(n, x):
    y = n.relu(n.conv(x))
    return n.conv2(n.relu(n.conv2(y))) + n.relu(y - 0.5)


def branches(n, x):
    y = n.conv(x)
    return n.relu(y) if n.training else y.tanh()


def gradients_stop(n, x):
    y = n.conv(x)
    with torch.no_grad():
        return F.relu(y), x * n.fc.weight[0]


def no_gradients_at_all(n, x):
    with torch.no_grad():
        y = n.relu(n.conv(x))
    return y * n.fc.weight[0]


def apart(n, x):
    a, b = n.conv(x), n.same(x)
    return n.relu(a) + n.relu(b)


def layers(n, x):
    return n.pool(n.relu(n.conv(x)))


def deep(n, x):
    y = n.pool(n.norm(n.relu_(n.conv(F.pad(x, (8, 8))))))
    return n.drop(n.relu(n.fc(y)))


# what the forward does; what is replaced and by what; what is left
CASES = {
    "stage": (
        lambda n, x: n.pool(n.norm(n.relu(n.conv(x)))),
        [f"{CONV} + {RELU} + {NORM} + {POOL} -> conv2d_relu_max_pool2d"],
    ),
    "stage of functions, even window": (
        lambda n, x: F.max_pool2d(F.local_response_norm(F.relu(n.conv(x), inplace=True), 4, 0.1, k=2.0), 3, stride=2),
        [f"{CONV} + relu() + local_response_norm() + max_pool2d() -> conv2d_relu_max_pool2d"],
    ),
    "stage without normalisation": (
        lambda n, x: torch.max_pool2d(torch.relu_(n.conv(x)), (2, 1)),
        [f"{CONV} + relu_() + max_pool2d() -> conv2d_relu_max_pool2d"],
    ),
    "a stage for one image": (
        lambda n, x: n.pool(n.relu(n.conv(x[0]))),
        [f"{CONV} + {RELU} + {POOL} -> conv2d_relu_max_pool2d"],
    ),
    "one image, whose channels LRN takes for a batch": (
        lambda n, x: n.pool(n.norm(n.relu(n.conv(x[0])))),
        [f"{CONV} + {RELU} -> conv2d_relu", f"{NORM} -> local_response_norm", f"{POOL} -> max_pool2d"],
    ),
    "methods": (
        lambda n, x: n.conv2(n.conv(x).relu()).relu_(),
        [
            f"{CONV} + .relu() -> conv2d_relu",
            "conv2 (Conv2d) + .relu_() -> conv2d_relu",
        ],
    ),
    "same padding, no bias": (lambda n, x: n.relu_(n.same(x)), ["same (Conv2d) + relu_ (ReLU) -> conv2d_relu"]),
    "a convolution's arguments": (
        lambda n, x: F.conv2d(
            n.relu(n.conv(x)), n.conv2.weight[:, :4], None, 2, (1, 2), dilation=[2, 1], groups=2
        ).relu(),
        [f"{CONV} + {RELU} -> conv2d_relu", "conv2d() + .relu() -> conv2d_relu"],
    ),
    "normalisation and pooling": (lambda n, x: n.pool(n.norm(x)), [f"{NORM} + {POOL} -> lrn_max_pool2d"]),
    "a window with borders": (
        lambda n, x: F.max_pool2d(n.norm(x), 3, 2, 1, dilation=2, ceil_mode=True),
        [f"{NORM} -> local_response_norm", "max_pool2d() -> max_pool2d"],
    ),
    "a window rounded up, to no effect": (
        lambda n, x: (F.max_pool2d(n.norm(x), 3, ceil_mode=True), F.max_pool2d(n.norm(x), 2, 1, ceil_mode=True)),
        [f"{NORM} + max_pool2d() -> lrn_max_pool2d"] * 2,
    ),
    "a window rounded up": (
        lambda n, x: F.max_pool2d(n.norm(x), (3, 2), ceil_mode=True),
        [f"{NORM} -> local_response_norm", "max_pool2d() -> max_pool2d"],
    ),
    "three dimensions mean other things to both": (
        lambda n, x: n.pool(n.norm(x[:, :, 0])),
        [f"{NORM} -> local_response_norm", f"{POOL} -> max_pool2d"],
    ),
    "linear": (lambda n, x: n.relu_(n.fc(x)), ["fc (Linear) + relu_ (ReLU) -> linear_relu_dropout"]),
    "linear of a vector": (
        lambda n, x: F.linear(x[0, 0, 0], n.fc.weight).relu(),
        ["linear() + .relu() -> linear_relu_dropout"],
    ),
    "linear with a bias for all": (
        lambda n, x: F.linear(x, n.fc.weight, n.fc.bias[:1]).relu(),
        [],
        ["linear(): its weight is no matrix, or its bias no vector of as many rows"],
    ),
    "linear and dropout": (
        lambda n, x: n.drop(n.relu(n.fc(x))),
        ["fc (Linear) + relu (ReLU) + drop (Dropout) -> linear_relu_dropout"],
    ),
    "writing into what an operator returns": (
        lambda n, x: (
            F.relu_(n.pool(x)),
            n.norm(x).mul_(2),
            n.pool(n.norm(x)).add_(1),
            n.pool(n.relu(n.conv(x))).neg_(),
        ),
        [
            f"{POOL} -> max_pool2d",
            f"{NORM} -> local_response_norm",
            f"{NORM} + {POOL} -> lrn_max_pool2d",
            f"{CONV} + {RELU} + {POOL} -> conv2d_relu_max_pool2d",
        ],
    ),
    "two layers, then two ReLUs": (
        apart,
        [f"{CONV} + {RELU} -> conv2d_relu", f"same (Conv2d) + {RELU} -> conv2d_relu"],
    ),
    "another user": (two_users, [], [TWO_USERS]),
    "written into": (written_into, [], [TWO_USERS]),
    "copied before it is written into": (copied_before, [], [TWO_USERS]),
    "the activation is returned": (
        activation_returned,
        [f"{CONV} + {RELU} -> conv2d_relu", f"{NORM} + {POOL} -> lrn_max_pool2d"],
    ),
    "returned": (lambda n, x: n.conv(x), [], [f"{CONV}: its output is returned"]),
    "layers used twice": (
        used_twice,
        [f"{CONV} + {RELU} -> conv2d_relu", f"conv2 (Conv2d) + {RELU} -> conv2d_relu"],
        ["conv2 (Conv2d): followed by add(), not by ReLU"],
    ),
    "a branch": (branches, [f"{CONV} + {RELU} -> conv2d_relu"]),
    "gradients stop before the ReLU": (
        gradients_stop,
        [],
        [f"{CONV}: gradients or autocast are switched before its ReLU"],
    ),
    "no gradients": (no_gradients_at_all, [f"{CONV} + {RELU} -> conv2d_relu"]),
    "other activations": (
        lambda n, x: F.relu6(n.conv(x)).mean() + F.leaky_relu(n.fc(x)),
        [],
        [
            f"{CONV}: followed by relu6(), not by ReLU",
            "fc (Linear): followed by leaky_relu(), not by ReLU",
        ],
    ),
    "integers": (
        lambda n, x: (n.pool((9 * x).int()).double(), n.fc(x)),
        [],
        [f"{POOL}: its input is torch.int32", "fc (Linear): its output is returned"],
    ),
    "indices": (
        lambda n, x: F.max_pool2d(n.norm(x), 2, return_indices=True)[0],
        [f"{NORM} -> local_response_norm"],
        ["max_pool2d(): it returns indices"],
    ),
    "a window as large as it gets": (
        lambda n, x: F.max_pool2d(x, 12) + F.max_pool2d(x, x.shape[2:]),
        [],
        [
            "max_pool2d(): kernel_size 12 has more than 127 cells",
            "max_pool2d(): kernel_size (15, 15) has more than 127 cells",
        ],
    ),
    "vmap": (
        lambda n, x: torch.func.vmap(lambda image: n.relu(n.conv(image)))(x),
        [],
        [f"{CONV}: its input belongs to a transform of torch.func"],
    ),
    "a checkpoint": (
        lambda n, x: checkpoint(n.block, x, use_reentrant=False),
        ["block.0 (Conv2d) + block.1 (ReLU) -> conv2d_relu"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_replaced(case, log):
    body, replaced, *left = CASES[case]
    model = Net(body).double()
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))
    assert log() == [replaced, left[0] if left else []]


def test_floats_that_may_change(log):
    """dynamic=True reads a module's floats inside the graph, where the layers use them."""
    model = Net(lambda n, x: n.pool(n.norm(n.relu(n.conv(x)))) + n.pool(n.norm(F.relu(n.same(x))))).double()
    fused = torch.compile(model, backend="fastalex", dynamic=True, fullgraph=True)
    for n in (2, 3):
        assert_same(model, fused, torch.randn(n, 3, 15, 15, dtype=torch.float64))
    replaced, _ = log()
    assert [line.partition(" -> ")[2] for line in replaced] == ["conv2d_relu_max_pool2d"] * 2


def test_one_graph_for_every_batch(log):
    """As ever with Dynamo: one for the first size, one for all others."""
    model = Net(lambda n, x: n.pool(n.norm(n.relu(n.conv(x))))).double()
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    counts = []
    for batch in (4, 3, 7, 12):
        assert_same(model, fused, torch.randn(batch, 3, 15, 15, dtype=torch.float64))
        counts.append(len(log()[0]))
    assert counts == [1, 1, 0, 0]


def test_training_and_evaluation(log):
    """Two graphs; dropout is drawn anew in each call, with its probability."""
    model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Dropout(0.25))
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    x = torch.randn(8, 4)
    dropped, again, kept = fused(x), fused(x), fused.eval()(x)
    assert not torch.equal(dropped, again)
    torch.testing.assert_close(kept, model(x))
    share = (dropped[kept > 0] == 0).float().mean().item()
    assert abs(share - 0.25) < 0.05  # over 3000 draws have a standard deviation below 0.008
    torch.testing.assert_close(dropped[dropped > 0], kept[dropped > 0] / 0.75)
    assert log()[0] == ["0 (Linear) + 1 (ReLU) + 2 (Dropout) -> linear_relu_dropout"] * 2


def test_a_dropout_that_is_written_into(log):
    """Its result is what our operator keeps for backward; PyTorch's keeps the mask."""

    def body(n, x):
        y = F.dropout(n.relu(n.fc(x)), 0.5, True)
        y.view(-1).mul_(2)
        return y

    fused = torch.compile(Net(body), backend="fastalex", fullgraph=True)
    run(fused, torch.randn(X))
    assert log()[0] == ["fc (Linear) + relu (ReLU) -> linear_relu_dropout"]


def test_a_graph_break(log):
    def body(n, x):
        y = n.relu(n.conv(x))
        torch._dynamo.graph_break()
        y = n.conv2(y)
        torch._dynamo.graph_break()
        return n.relu(y)

    model = Net(body).double()
    assert_same(model, torch.compile(model, backend="fastalex"), torch.randn(X, dtype=torch.float64))
    assert log() == [[f"{CONV} + {RELU} -> conv2d_relu"], ["conv2 (Conv2d): its output is returned"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(dtype, where, log):
    """Dtypes are PyTorch's, where autocast widens the normalisation too; values are as near as their rounding.

    Gradients may go to another cell of a window, where rounding makes two of them equal.
    """
    contexts = [contextlib.nullcontext(), torch.autocast("cpu", dtype)]
    inside, outside = contexts if where == "outside" else reversed(contexts)

    def body(n, x):
        with inside:
            y = n.relu(n.conv(x))
            return (
                y,
                n.pool(n.norm(y)),
                n.norm(y),
                n.relu(n.fc(x)),
                n.relu(n.fc(x.double().float())),
                n.pool(x.to(dtype)),
            )

    model, x = Net(body), torch.randn(X)
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    with outside:
        expected, actual = run(model, x), run(fused, x)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for e, a in zip(expected[:6], actual, strict=False):
        torch.testing.assert_close(a, e, rtol=0, atol=4 * UNIT_ROUNDOFF[dtype] * e.abs().max().item())
    assert len(log()[0]) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, log):
    """Against float32: PyTorch's LRN has no half precision on a CPU."""
    model, x = Net(deep), torch.randn(X)
    fused = torch.compile(copy.deepcopy(model).to(dtype), backend="fastalex", fullgraph=True)
    expected, actual = run(model, x), run(fused, x.to(dtype))
    assert {t.dtype for t in actual} == {dtype}
    atol = 16 * UNIT_ROUNDOFF[dtype] * expected[0].abs().max().item()
    torch.testing.assert_close(actual[0].float(), expected[0], rtol=0, atol=atol)
    assert len(log()[0]) == 2


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["conv", "relu"])
def test_hooks_see_what_they_saw(kind, where):
    seen = []
    model = Net(lambda n, x: n.pool(n.relu(n.conv(x)))).double()

    def hook(module, *tensors):
        last = tensors[-1][0] if isinstance(tensors[-1], tuple) else tensors[-1]
        seen.append(last.detach().clone())

    getattr(model.get_submodule(where), f"register_{kind}_hook")(hook)
    assert_same(model, torch.compile(model, backend="fastalex"), torch.randn(X, dtype=torch.float64))
    expected, actual = seen
    torch.testing.assert_close(actual, expected)


def test_tensor_hooks_and_kept_gradients():
    def body(n, x):
        y = n.conv(x)
        y.register_hook(lambda grad: 2 * grad)
        return n.pool(n.relu(y))

    model = Net(body).double()
    assert_same(model, torch.compile(model, backend="fastalex"), torch.randn(X, dtype=torch.float64))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context, log):
    model = Net(deep)
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    with context():
        x = torch.randn(X)
        torch.testing.assert_close(fused(x), model(x))
    assert len(log()[0]) == 2


class Labelled(torch.Tensor):
    pass


def test_other_kinds_of_tensors_pass():
    model, x = Net(lambda n, x: n.pool(x)), torch.randn(X).as_subclass(Labelled)
    out, expected = torch.compile(model, backend="fastalex")(x), model(x)
    assert type(out) is type(expected) is Labelled
    assert torch.equal(out.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.float64, "the kernels take float32, float16 and bfloat16, not float64"),
        (torch.float32, "the triton package is not installed"),
        (torch.complex64, "its input is torch.complex64"),
    ],
)
def test_what_the_kernels_refuse_is_left(dtype, reason, monkeypatch):
    monkeypatch.setattr(fastalex.backend, "HAS_TRITON", dtype != torch.float32)
    traced = fx.symbolic_trace(Net(lambda n, x: F.max_pool2d(x, 2)))
    with FakeTensorMode():
        for node in traced.graph.nodes:
            node.meta["example_value"] = torch.empty(X, device="cuda", dtype=dtype)
    report = dynamo.Report()
    dynamo._rewrite(traced, report)
    assert (report.replaced, report.left) == ([], [f"max_pool2d(): {reason}"])


# the backend's name and options; before Dynamo is imported: test_package.py


def test_the_name_is_known_where_dynamo_was_imported_first(monkeypatch):
    from torch._dynamo.backends import registry

    monkeypatch.delitem(registry._BACKENDS, "fastalex")
    monkeypatch.delitem(registry._COMPILER_FNS, "fastalex", raising=False)
    dynamo.register()
    assert registry.lookup_backend("fastalex") is dynamo.compile_graph


def test_the_graph_goes_on_to_another_backend():
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(collections.Counter(node.target for node in graph_module.graph.nodes))
        return graph_module.forward

    model = Net(lambda n, x: n.pool(n.relu(n.conv(x)))).double()
    assert_same(
        model,
        torch.compile(model, backend="fastalex", options={"inner": inner}, fullgraph=True),
        torch.randn(X, dtype=torch.float64),
    )
    (targets,) = graphs
    assert targets[fastalex.functional.conv2d_relu_max_pool2d] == 1
    assert torch.conv2d not in targets


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_further(inner, dynamic):
    model = Net(deep)
    fused = torch.compile(model, backend="fastalex", options={"inner": inner}, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 4):
        x = torch.randn(batch, 3, 15, 15)
        for e, a in zip(run(model, x), run(fused, x), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"max_autotune": True}}, "may hold \"inner\" and nothing else, got {'max_autotune': True}"),
        ({"options": {"inner": "inductr"}}, "inductr"),
        ({"mode": "reduce-overhead"}, "has no mode, got 'reduce-overhead'"),
    ],
)
def test_unknown_options(arguments, message):
    fused = torch.compile(nn.ReLU(), backend="fastalex", **arguments)
    with pytest.raises(Exception, match=re.escape(message)):
        fused(torch.randn(3))


# models of others


def small(builder, **arguments):
    """The model with its 4096 hidden units, which are 100 million weights, as 32, in float64 and without dropout."""

    def units(count):
        return 32 if count == 4096 else count

    with torch.device("meta"):
        model = builder(num_classes=7, **arguments)
        for parent in list(model.modules()):
            for name, m in parent.named_children():
                if isinstance(m, nn.Linear):
                    setattr(parent, name, nn.Linear(units(m.in_features), units(m.out_features)))
                if isinstance(m, nn.Conv2d) and m.out_channels == 4096:
                    setattr(parent, name, nn.Conv2d(units(m.in_channels), 32, m.kernel_size))
                if isinstance(m, nn.Dropout):
                    m.p = 0.0
    model = model.to_empty(device="cpu").double()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.05)
    for b in model.buffers():
        b.fill_(1)
    return model


STAGE, CONVS, LINEAR = "conv2d_relu_max_pool2d", "conv2d_relu", "linear_relu_dropout"
NORMS, POOLS = "local_response_norm", "max_pool2d"
# package, name, side of the image, arguments; how often each function is put in
MODELS = {
    "torchvision alexnet": ("torchvision.models", "alexnet", 64, {}, {STAGE: 3, CONVS: 2, LINEAR: 2}),
    "torchvision vgg11": ("torchvision.models", "vgg11", 64, {}, {STAGE: 5, CONVS: 3, LINEAR: 2}),
    "torchvision squeezenet1_1": ("torchvision.models", "squeezenet1_1", 64, {}, {STAGE: 1, CONVS: 25, POOLS: 2}),
    "torchvision resnet18": ("torchvision.models", "resnet18", 64, {}, {POOLS: 1}),
    "torchvision googlenet": (
        "torchvision.models", "googlenet", 64, {"init_weights": False, "aux_logits": False}, {POOLS: 13},
    ),
    "torchvision inception_v3": (
        "torchvision.models", "inception_v3", 96, {"init_weights": False, "aux_logits": False}, {POOLS: 4},
    ),
    "pytorchcv alexnet": (
        "pytorchcv.models.alexnet", "alexnet", 224, {}, {STAGE: 2, CONVS: 3, NORMS: 1, POOLS: 1, LINEAR: 2},
    ),
    "pytorchcv zfnet": (
        "pytorchcv.models.zfnet", "zfnet", 224, {}, {STAGE: 1, CONVS: 4, NORMS: 2, POOLS: 2, LINEAR: 2},
    ),
    "timm vgg11": ("timm.models.vgg", "vgg11", 64, {}, {STAGE: 5, CONVS: 5}),
}  # fmt: skip
SLOW = {"pytorchcv zfnet", *(f"torchvision {name}" for name in ("vgg11", "resnet18", "googlenet", "inception_v3"))}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_models_of_others(name, log):
    package, builder, size, arguments, counts = MODELS[name]
    model = small(getattr(pytest.importorskip(package), builder), **arguments)
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    assert_same(model, fused, torch.randn(2, 3, size, size, dtype=torch.float64), terms=4096)
    assert collections.Counter(line.partition(" -> ")[2] for line in log()[0]) == counts


def lpips_of_lpips():
    package = pytest.importorskip("lpips")
    return package.LPIPS(net="alex", pretrained=False, pnet_rand=True, pnet_tune=True, verbose=False)


def lpips_of_torchmetrics():
    package = pytest.importorskip("torchmetrics.functional.image.lpips")
    return package._LPIPS(pretrained=False, net="alex", pnet_rand=True, pnet_tune=True)


@pytest.mark.parametrize(
    ("build", "times"), [(lpips_of_lpips, 2), pytest.param(lpips_of_torchmetrics, 1, marks=pytest.mark.slow)]
)
def test_perceptual_losses(build, times, log):
    """Every activation is returned, so no stages; torchmetrics breaks the graph, and its trunk is compiled once."""
    model = build().double().eval()
    fused = torch.compile(model, backend="fastalex")
    x = torch.rand(2, 1, 3, 64, 64, dtype=torch.float64).requires_grad_()
    distances = [m(*x, normalize=True) for m in (model, fused)]
    torch.testing.assert_close(*distances, rtol=1e-9, atol=0)
    parameters = [x, *model.parameters()]
    expected, actual = (torch.autograd.grad(d.sum(), parameters, allow_unused=True) for d in distances)
    for e, a in zip(expected, actual, strict=True):
        assert (e is None) == (a is None)
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9 * e.abs().max().item())
    counts = collections.Counter(line.partition(" -> ")[2] for line in log()[0])
    assert counts == {CONVS: 5 * times, POOLS: 2 * times}


@pytest.mark.slow
def test_the_code_of_the_documentation(monkeypatch):
    """As it stands there, without the weights, which would be downloaded."""
    models, package = pytest.importorskip("torchvision.models"), pytest.importorskip("lpips")
    monkeypatch.setattr(models, "alexnet", lambda build=models.alexnet, **arguments: build())
    options = {"pretrained": False, "pnet_rand": True, "verbose": False}
    monkeypatch.setattr(package, "LPIPS", lambda net, build=package.LPIPS: build(net=net, **options))
    page = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    text = page.split("## Other people's models\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)


# the model stays what it was


def test_fuse_is_a_copy_of_the_same_kind():
    model = Net(two_users)
    model.note = "mine"
    fused = fastalex.fuse(model)
    assert type(fused) is Net
    assert fused.note == "mine"
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(X)
    assert_same(model, fused, x)
    before = model(x)[0]
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert torch.equal(model(x)[0], before)
    assert not fused(x)[0].any()
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
        fastalex.fuse("alexnet")


def test_a_change_of_the_model_counts(log):
    """Dynamo's guards: another layer, another attribute, other weights."""
    model = fastalex.fuse(Net(layers))
    x = torch.randn(X)
    assert_same(copy.deepcopy(model), model, x)
    model.relu = nn.Tanh()
    assert_same(copy.deepcopy(model), model, x)
    model.relu, model.pool.kernel_size = nn.ReLU(), 2
    assert_same(copy.deepcopy(model), model, x)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert_same(copy.deepcopy(model), model, x)
    assert [len(lines) for lines in log()] == [3, 1]


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_the_plain_model(how, log):
    """And can be compiled again."""
    fused = fastalex.fuse(Net(layers))
    x = torch.randn(X)
    expected = fused(x)
    assert log()[0]
    twin = COPIES[how](fused)
    torch.testing.assert_close(twin(x), expected)
    assert log() == [[], []]
    twin.compile(backend="fastalex")
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), expected), "a copy that runs on the original's weights"


def test_exports_see_the_plain_model():
    fused = fastalex.fuse(Net(layers))
    x = torch.randn(X)
    exported = torch.export.export(fused, (x,))
    assert not any("fastalex" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), fused(x))


def test_a_second_derivative_is_refused():
    fused = fastalex.fuse(Net(layers))
    x = torch.randn(X).requires_grad_()
    (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastalex\.conv2d_relu_pool has no second derivative"):
        grad.sum().backward()


def test_explain():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    text = """replaced (1):
  0 (Conv2d) + 1 (ReLU) -> fastalex.functional.conv2d_relu
left (1):
  2 (Conv2d): followed by 3 (BatchNorm2d), not by ReLU"""
    x = torch.randn(X)
    for kind in (model, fastalex.fuse(model), torch.compile(model, backend="fastalex")):
        assert str(fastalex.explain(kind, x)) == text
    assert fastalex.explain(lambda x, size: F.max_pool2d(x, size), x, size=2).replaced


def test_which_implementations_run():
    """What `fastalex.choices.explain` and tuning ask, though Dynamo steps aside where a dispatch mode watches."""
    model, x = Net(deep), torch.randn(X)
    lines = [f"{name}: fastalex.cpu, for CPU tensors" for name in ("conv2d_relu_pool", "linear_relu_dropout")]
    for kind in (fastalex.fuse(model), torch.compile(model, backend="fastalex")):
        assert fastalex.choices.explain(kind, x).splitlines() == lines


def test_by_the_kernels(log):
    """In Triton's interpreter."""
    model, x = Net(deep), torch.randn(X)
    fused = torch.compile(model, backend="fastalex", fullgraph=True)
    with fastalex.backend.use("triton"):
        assert_same(model, fused, x, terms=256)
    assert len(log()[0]) == 2

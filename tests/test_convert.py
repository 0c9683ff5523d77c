"""fuse and unfuse: other people's models keep their class, names, weights and results, or are left alone."""

import inspect
import itertools
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from calls import COPIES
from tolerances import UNIT_ROUNDOFF
from torch import nn

import fastalex
from fastalex.nn import ConvReLU2d, LinearReLUDropout, LocalResponseNorm, LRNMaxPool2d, MaxPool2d


def layers(model):
    return [type(m) for m in model.modules()]


def run(model, x):
    """Outputs, then the gradients of the input and of each parameter that has one."""
    x = x.clone().requires_grad_()
    outputs = model(x)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(
        sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), wanted, allow_unused=True
    )
    return [y.detach() for y in outputs] + [g for g in grads if g is not None]


def assert_same(model, fused, x, *, terms=64):
    """Equal outputs and gradients, to the rounding of `terms` additions relative to the largest element.

    The two sides add the same numbers in other orders; each of the layers below contributes fewer than `terms`
    roundings to a result, in units of the dtype that the model computes in.
    """
    expected, actual = run(model, x), run(fused, x)
    assert len(expected) == len(actual)
    for e, a in zip(expected, actual, strict=True):
        assert e.dtype == a.dtype
        assert e.shape == a.shape
        error = (e - a).abs().max().item() if e.numel() else 0.0
        assert error <= terms * UNIT_ROUNDOFF[e.dtype] * e.abs().max().item(), f"{error} in {tuple(e.shape)}"


def fused_copy(model, *pieces):
    """fuse(model), after checking that the report mentions these pieces."""
    fused = fastalex.fuse(model)
    text = str(fused.fastalex_report)
    for piece in pieces:
        assert piece in text, text
    assert type(fused) is type(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    return fused


class Plain(nn.Module):
    """LRN, pooling, module ReLUs, a classifier with dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, (2, 3), padding="same"),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.LocalResponseNorm(3),
        )
        self.classifier = nn.Sequential(nn.Linear(8 * 16, 16), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(16, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class Functional(nn.Module):
    """Everything but the weights is a function or a method."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 9, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x, scale: float = 1.0):
        x = F.relu(self.conv1(x), inplace=True)
        x = F.max_pool2d(F.local_response_norm(x, 5, k=2.0), 3, stride=2)
        x = self.conv2(x).relu_()
        x = F.local_response_norm(F.max_pool2d(x, (2, 2)), 3)
        x = torch.relu(self.conv3(x))
        x = torch.flatten(x, 1)
        x = F.dropout(self.fc1(x).relu(), 0.5, self.training)
        return self.fc2(x) * scale


X = (2, 3, 15, 15)


# what is replaced, with equal results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_modules(dtype, training):
    model = Plain().to(dtype).train(training)
    fused = fused_copy(
        model,
        "features.0 (Conv2d) + features.1 (ReLU) -> fastalex.nn.ConvReLU2d",
        "features.2 (LocalResponseNorm) + features.3 (MaxPool2d) -> fastalex.nn.LRNMaxPool2d",
        "features.6 (MaxPool2d) -> fastalex.nn.MaxPool2d",
        "features.7 (LocalResponseNorm) -> fastalex.nn.LocalResponseNorm",
        "classifier.0 (Linear) + classifier.1 (ReLU) + classifier.2 (Dropout) -> fastalex.nn.LinearReLUDropout",
        "classifier.3 (Linear): its output is returned by classifier (Sequential)",
    )
    found = layers(fused)
    for kind, count in ((ConvReLU2d, 2), (LRNMaxPool2d, 1), (MaxPool2d, 1), (LocalResponseNorm, 1), (nn.Identity, 5)):
        assert found.count(kind) == count
    assert nn.ReLU not in found
    assert fused.features[2].after_relu
    assert_same(model, fused, torch.randn(X, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions(dtype):
    model = Functional().to(dtype).eval()
    fused = fused_copy(
        model,
        "conv1 (Conv2d) + relu() -> fastalex.nn.ConvReLU2d",
        "conv2 (Conv2d) + .relu_() -> fastalex.nn.ConvReLU2d",
        "fc1 (Linear) + .relu() -> fastalex.nn.LinearReLUDropout",
        "local_response_norm() + max_pool2d() in the model (Functional) -> fastalex.functional.lrn_max_pool2d",
        "max_pool2d() in the model (Functional) -> fastalex.functional.max_pool2d",
        "local_response_norm() in the model (Functional) -> fastalex.functional.local_response_norm",
        "forward of the model (Functional): rewritten",
    )
    assert_same(model, fused, torch.randn(X, dtype=dtype))
    source = fused.forward.sources[True][0]
    assert "relu" not in source.replace("conv2d_relu", "").replace("after_relu", "")
    assert "after_relu = True" in source
    assert inspect.signature(fused.forward) == inspect.signature(model.forward)
    x = torch.randn(X, dtype=dtype)
    torch.testing.assert_close(fused(x, scale=2.0), 2 * fused(x))


def test_functional_dropout_follows_the_mode():
    fused = fastalex.fuse(Functional())
    x = torch.randn(X)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))


def test_dropout_follows_the_mode_and_keeps_its_probability():
    model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Dropout(0.25))
    fused = fused_copy(model)
    x = torch.randn(8, 4)
    dropped, kept = fused(x), fused.eval()(x)
    torch.testing.assert_close(kept, model.eval()(x))
    positive = kept > 0
    share = (dropped[positive] == 0).float().mean().item()
    assert abs(share - 0.25) < 0.05  # over 3000 draws have a standard deviation below 0.008
    torch.testing.assert_close(dropped[dropped > 0], kept[dropped > 0] / 0.75)


@pytest.mark.parametrize(
    ("name", "replaced", "convs"),
    [("alexnet", 10, 5), ("vgg11", 8 + 2 + 5, 8), ("squeezenet1_0", 26 + 3, 26), ("resnet18", 1, 0)],
)
@pytest.mark.parametrize("training", [True, False])
def test_torchvision(name, replaced, convs, training):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=7)
    if name in ("alexnet", "vgg11"):  # 4096 hidden units are 100 million weights; 32 do the same
        inputs = model.classifier[0 if name == "vgg11" else 1].in_features
        for i, m in enumerate(model.classifier):
            if isinstance(m, nn.Linear):
                shape = (inputs if m.in_features == inputs else 32, 7 if m.out_features == 7 else 32)
                model.classifier[i] = nn.Linear(*shape, device="meta")
    model = model.to_empty(device="cpu").double()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.05)
    for b in model.buffers():
        b.fill_(1)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model.train(training)
    fused = fused_copy(model)
    assert len(fused.fastalex_report.replaced) == replaced
    assert layers(fused).count(ConvReLU2d) == convs
    if name == "resnet18":
        assert "layer1.0.conv1 (Conv2d): followed by layer1.0.bn1 (BatchNorm2d), not by ReLU" in str(
            fused.fastalex_report
        )
    assert_same(model, fused, torch.randn(2, 3, 64, 64, dtype=torch.float64), terms=4096)


def test_googlenet_branches_in_its_forward():
    models = pytest.importorskip("torchvision.models")
    model = models.googlenet(num_classes=3, init_weights=False).eval()
    fused = fused_copy(
        model,
        "conv1.conv (Conv2d): followed by conv1.bn (BatchNorm2d), not by ReLU",
        "maxpool1 (MaxPool2d) -> fastalex.nn.MaxPool2d",
        "inception3a.branch4.0 (MaxPool2d) -> fastalex.nn.MaxPool2d",
        "aux1.fc1 (Linear) + relu() + aux1.dropout (Dropout) -> fastalex.nn.LinearReLUDropout",
        "forward of aux1 (InceptionAux): rewritten without relu()",
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0)
    for m in [*model.modules(), *fused.modules()]:
        if isinstance(m, nn.Dropout | LinearReLUDropout):
            m.p = 0.0
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for expected, actual in zip(model.train()(x), fused.train()(x), strict=True):
            torch.testing.assert_close(actual, expected)


class Slices(nn.Module):
    """Like LPIPS: slices of one Sequential, each activation returned."""

    def __init__(self, cuts):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(True), nn.Conv2d(8, 4, 1)
        )
        self.slices = nn.ModuleList(self.features[a:b] for a, b in itertools.pairwise(cuts))

    def forward(self, x):
        outputs = []
        for part in self.slices:
            x = part(x)
            outputs.append(x)
        return tuple(outputs)


def test_slices_after_relu_are_fused():
    model = Slices([0, 2, 5]).double()
    fused = fused_copy(model, "features.0 (Conv2d) + features.1 (ReLU)", "features.3 (Conv2d) + features.4 (ReLU)")
    assert layers(fused).count(ConvReLU2d) == 2
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))


def test_a_slice_that_ends_before_the_relu_is_not():
    model = Slices([0, 1, 2, 5])
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    fused = fused_copy(model, "features.0 (Conv2d): its output is returned by slices.0 (Sequential)")
    assert type(fused.features[0]) is nn.Conv2d
    assert type(fused.features[1]) is nn.ReLU
    assert type(fused.features[3]) is ConvReLU2d
    assert_same(model, fused, torch.randn(X))


class LPIPS(nn.Module):
    """lpips.LPIPS(net="alex") as that package writes it: slices of torchvision's features called by way of
    `self.net.forward`, an argument that branches, linear layers kept twice."""

    def __init__(self):
        super().__init__()
        features = pytest.importorskip("torchvision.models").alexnet().features
        self.net = LPIPSTrunk(features)
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = (
            nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False)) for channels in (64, 192, 384, 256, 256)
        )
        self.lins = nn.ModuleList([self.lin0, self.lin1, self.lin2, self.lin3, self.lin4])

    def forward(self, in0, in1, retPerLayer=False, normalize=False):
        if normalize:
            in0, in1 = 2 * in0 - 1, 2 * in1 - 1
        outs0, outs1 = self.net.forward(in0), self.net.forward(in1)
        diffs = [
            (a / (a.square().sum(1, True).sqrt() + 1e-10) - b / (b.square().sum(1, True).sqrt() + 1e-10)) ** 2
            for a, b in zip(outs0, outs1, strict=True)
        ]
        res = [self.lins[kk](diffs[kk]).mean((2, 3), True) for kk in range(len(self.lins))]
        return (sum(res), res) if retPerLayer else sum(res)


class LPIPSTrunk(nn.Module):
    def __init__(self, features):
        super().__init__()
        for i, (start, stop) in enumerate(itertools.pairwise((0, 2, 5, 8, 10, 12))):
            setattr(self, f"slice{i + 1}", nn.Sequential())
            for x in range(start, stop):
                getattr(self, f"slice{i + 1}").add_module(str(x), features[x])
        for param in self.parameters():
            param.requires_grad = False

    def forward(self, X):
        h = self.slice1(X)
        h_relu1 = h
        h = self.slice2(h)
        h_relu2 = h
        h = self.slice3(h)
        h_relu3 = h
        h = self.slice4(h)
        h_relu4 = h
        h = self.slice5(h)
        alexnet_outputs = namedtuple("AlexnetOutputs", ["relu1", "relu2", "relu3", "relu4", "relu5"])
        return alexnet_outputs(h_relu1, h_relu2, h_relu3, h_relu4, h)


LPIPS_REPORT = [
    "net.slice1.0 (Conv2d) + net.slice1.1 (ReLU) -> fastalex.nn.ConvReLU2d",
    "net.slice5.10 (Conv2d) + net.slice5.11 (ReLU) -> fastalex.nn.ConvReLU2d",
    "net.slice2.2 (MaxPool2d) -> fastalex.nn.MaxPool2d",
]


def check_lpips(model):
    fused = fused_copy(model, *LPIPS_REPORT)
    assert layers(fused).count(ConvReLU2d) == 5
    x, y = torch.rand(2, 1, 3, 64, 64, dtype=torch.float64).requires_grad_()
    distances = [m(x, y, normalize=True) for m in (model, fused)]
    torch.testing.assert_close(*distances, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), x)[0] for d in distances), rtol=1e-6, atol=1e-12)


def test_lpips():
    check_lpips(LPIPS().double().eval())


def test_lpips_from_its_package():
    lpips = pytest.importorskip("lpips")
    check_lpips(lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).double())


class SharedReLU(nn.Module):
    def __init__(self, norm, inplace=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        if_norm = self.norm(x)
        return self.relu(if_norm - 0.5)


class Branches(nn.Module):
    """Calls the convolution without a ReLU on a path that a trace does not take."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.linear = nn.Conv2d(3, 8, 3), nn.ReLU(), False
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x):
        if self.linear:
            return self.conv(x)
        return self.block(self.relu(self.conv(x)))


class OnlyWhileTraining(nn.Module):
    """The graphs of the two modes differ without a branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.conv(x)
        return (F.relu, torch.tanh)[self.training](y)


class OnlyAfterConvs(SharedReLU):
    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.conv1(x))))


def test_a_relu_module_shared_by_fused_layers_alone_vanishes():
    model = OnlyAfterConvs(False, inplace=True).double()
    fused = fused_copy(model, "conv1 (Conv2d) + relu (ReLU)", "conv2 (Conv2d) + relu (ReLU)")
    assert type(fused.relu) is nn.Identity
    assert "forward" not in vars(fused)
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_module_shared_with_others_stays(inplace):
    model = SharedReLU(True, inplace).double()
    fused = fused_copy(model, "conv1 (Conv2d) + relu", "forward of the model (SharedReLU): rewritten without relu")
    assert type(fused.relu) is nn.ReLU
    assert layers(fused).count(ConvReLU2d) == 2
    assert fused.forward.sources[True][0].count("self.relu(") == 1
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))


def test_an_in_place_relu_after_a_fused_pool():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2), nn.ReLU(inplace=True), nn.LocalResponseNorm(5)
    ).double()
    fused = fused_copy(model, "0 (Conv2d): followed by 1 (MaxPool2d), not by ReLU")
    assert layers(fused).count(nn.ReLU) == 1
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))


# what is left alone


class TwoUsers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.relu, self.norm, self.pool = nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)

    def forward(self, x):
        y = self.conv(x)
        n = self.norm(self.relu(y))
        z = self.fc(n.mean((2, 3)))
        return self.pool(n), y, torch.relu(z) + z


def test_an_activation_with_two_users():
    model = TwoUsers().double()
    fused = fused_copy(
        model,
        "conv (Conv2d): its output has 2 users in the model (TwoUsers)",
        "fc (Linear): its output has 2 users",
        "norm (LocalResponseNorm) -> fastalex.nn.LocalResponseNorm",
        "pool (MaxPool2d) -> fastalex.nn.MaxPool2d",
    )
    assert_same(model, fused, torch.randn(X, dtype=torch.float64))


class ActivationReturned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.norm, self.pool = nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)

    def forward(self, x):
        y = self.relu(self.conv(x))
        return y, self.pool(self.norm(y))


def test_the_gradient_of_a_returned_activation_is_not_the_one_before_the_relu():
    model = ActivationReturned().double()
    fused = fused_copy(model, "norm (LocalResponseNorm) + pool (MaxPool2d) -> fastalex.nn.LRNMaxPool2d")
    assert not fused.norm.after_relu
    x = torch.randn(X, dtype=torch.float64)
    assert_same(model, fused, x)
    grads = []
    for m in (model, fused):
        y, pooled = m(x)
        grads += torch.autograd.grad(pooled.sum(), y)
    torch.testing.assert_close(*grads)


class InPlaceElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        y = self.conv(x)
        F.relu_(y)
        return y * 2


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3), nn.ReLU()

    def forward(self, x):
        return self.conv(self.relu(self.conv(x)))


class Untraceable(nn.Module):
    """Takes its features apart, so that nothing in them is safe; its head is called as a whole."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        maps = []
        for layer in self.features:
            x = layer(x)
            maps.append(x)
        if x.mean() > 1e9:
            return maps[0]
        return maps[0].sum() + torch.relu(self.conv(self.head(x)))


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x)) + self.conv.forward(x) + self.relu.forward(-x).mean()


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 8, 3), []

    def forward(self, x):
        self.before = self.conv(x)
        self.seen.append(x.shape)
        return F.relu(self.before)


class WithoutGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return F.relu(y) + F.max_pool2d(x, 3, 1).mean()


class Decorated(WithoutGrad):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.conv(x))


class Noise(WithoutGrad):
    def forward(self, x):
        return F.relu(self.conv(x)) * torch.rand(3).sum() + F.max_pool2d(x, 3, 1).mean()


@pytest.mark.parametrize(
    ("model", "pieces"),
    [
        (InPlaceElsewhere(), ["conv (Conv2d): its output has 2 users"]),
        (CalledTwice(), ["conv (Conv2d): its output is returned by the model (CalledTwice)"]),
        (
            Untraceable(),
            [
                "features.0 (Conv2d): the model (Untraceable), whose forward cannot be traced (TraceError",
                "head.0 (Conv2d) + head.1 (ReLU) -> fastalex.nn.ConvReLU2d",
                "conv (Conv2d): the model (Untraceable), whose forward cannot be traced",
            ],
        ),
        (CallsForward(), ["conv (Conv2d): the model (CallsForward), whose forward calls the forward of a module"]),
        (Keeps(), ["conv (Conv2d): the model (Keeps), whose forward keeps attributes or makes tensors"]),
        (WithoutGrad(), ["max_pool2d() in the model (WithoutGrad): its forward switches autograd or autocast"]),
        (Decorated(), ["conv (Conv2d): the model (Decorated), whose forward is decorated"]),
        (Noise(), ["max_pool2d() in the model (Noise): its forward keeps attributes or makes tensors"]),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
            ["padding_mode is 'reflect'"],
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU()), ["0 (Conv2d): followed by 1 (LeakyReLU), not by ReLU"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6()), ["0 (Conv2d): followed by 1 (ReLU6), not by ReLU"]),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU()),
            ["0 (ParametrizedConv2d): ParametrizedConv2d is a subclass"],
        ),
        (nn.Sequential(nn.MaxPool2d(12)), ["0 (MaxPool2d): kernel_size 12 has more than 127 cells"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_left_alone(model, pieces):
    fused = fused_copy(model, *pieces)
    assert layers(fused).count(ConvReLU2d) == (1 if isinstance(model, Untraceable) else 0)
    assert "forward" not in vars(fused)
    x = torch.randn(X)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(fused(x), expected)


def test_a_path_that_was_not_traced():
    model = Branches()
    fused = fused_copy(
        model,
        "conv (Conv2d): the model (Branches), whose forward branches (in forward), may call it",
        "block.0 (Conv2d) + block.1 (ReLU) -> fastalex.nn.ConvReLU2d",
    )
    model.linear = fused.linear = True
    assert_same(model, fused, torch.randn(X))


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_count(training):
    model = OnlyWhileTraining().train(training)
    fused = fused_copy(model, "conv (Conv2d): followed by tanh(), not by ReLU")
    for mode in (True, False):
        assert_same(model.train(mode), fused.train(mode), torch.randn(X))


def test_tracing_leaves_no_trace():
    model = Keeps()
    fastalex.fuse(model, inplace=True)
    assert not model.seen
    assert not hasattr(model, "before")


@pytest.mark.parametrize("kind", ["forward", "full_backward", "full_backward_pre"])
def test_a_hook_on_a_convolution_sees_what_it_saw(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    seen = []
    getattr(model[0], f"register_{kind}_hook")(lambda m, *tensors: seen.append(tensors[-1]))
    fused = fused_copy(model, "0 (Conv2d): has a hook that sees its output before the ReLU")
    x = torch.randn(X)
    assert_same(model, fused, x)
    of_model, of_fused = (v if isinstance(v, torch.Tensor) else v[0] for v in seen)
    assert torch.equal(of_model, of_fused)


@pytest.mark.parametrize("where", [1, 2, 4, 5, 7, 8])
def test_a_hook_on_a_module_that_would_vanish(where):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Dropout(0.0),
    )
    seen = []
    model[where].register_forward_hook(lambda m, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    fused = fused_copy(model)
    x = torch.randn(X)
    with torch.no_grad():
        model(x)
        fused(x)
    (of_model, of_fused) = seen
    torch.testing.assert_close(of_fused, of_model)
    assert LRNMaxPool2d in layers(fused) or where in (4, 5)


def test_a_pre_hook_on_a_convolution_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model[0].register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],))
    fused = fused_copy(model)
    assert type(fused[0]) is ConvReLU2d
    assert_same(model, fused, torch.randn(X))


def test_dropout_in_another_mode_or_of_another_kind_stays():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.AlphaDropout())
    model.eval()[2].train()  # Monte Carlo dropout
    fused = fused_copy(model)
    assert layers(fused)[1:] == [
        LinearReLUDropout,
        nn.Identity,
        nn.Dropout,
        LinearReLUDropout,
        nn.Identity,
        nn.AlphaDropout,
    ]
    assert fused[0].p == fused[3].p == 0
    x = torch.randn(5, 3)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), expected)


# the model stays what it was


def test_the_original_is_untouched_unless_asked_for():
    model = Plain()
    kinds, weights = layers(model), [p.clone() for p in model.parameters()]
    fused = fastalex.fuse(model)
    assert layers(model) == kinds
    assert not hasattr(model, "fastalex_report")
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))

    parameters, conv = list(model.parameters()), model.features[0]
    assert fastalex.fuse(model, inplace=True) is model
    assert model.features[0] is conv
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert ConvReLU2d in layers(model)


@pytest.mark.parametrize("kind", [Plain, Functional])
def test_unfuse_restores_modules_forward_and_attributes_and_keeps_weights(kind):
    model = kind()
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    fused = fastalex.fuse(model, inplace=True)
    optimizer = torch.optim.SGD(fused.parameters(), 0.1)
    fused(torch.randn(X)).sum().backward()
    optimizer.step()
    trained = {k: v.clone() for k, v in fused.state_dict().items()}
    assert fastalex.unfuse(fused) is model
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert layers(model) == layers(kind())
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=f"model must come from fastalex.fuse, got {kind.__name__}"):
        fastalex.unfuse(model)


@pytest.mark.parametrize("kind", [Plain, Functional])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_fused_model(kind, how):
    fused = fastalex.fuse(kind().eval())
    twin = COPIES[how](fused)
    x = torch.randn(X)
    assert torch.equal(twin(x), fused(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), fused(x)), "a copy that runs on the original's weights"
    assert layers(fastalex.unfuse(twin)) == layers(kind())
    assert ConvReLU2d in layers(fused)


@pytest.mark.parametrize("kind", [Plain, Functional])
def test_state_dicts_move_both_ways(kind):
    model, fused = kind().eval(), fastalex.fuse(kind().eval())
    fused.load_state_dict(model.state_dict())
    assert_same(model, fused, torch.randn(X))
    model.load_state_dict(fused.state_dict())


def test_fusing_twice_is_fusing_once():
    model = Functional().eval()
    once = fastalex.fuse(model)
    twice = fastalex.fuse(once)
    assert layers(twice) == layers(once)
    assert str(twice.fastalex_report) == str(once.fastalex_report)
    x = torch.randn(X)
    assert torch.equal(twice(x), once(x))
    assert layers(fastalex.unfuse(twice)) == layers(model)


def test_mode_dtype_device_memory_format_and_requires_grad_are_kept():
    model = Plain().to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model.features[0].weight.requires_grad_(False)
    fused = fastalex.fuse(model)
    assert not any(m.training for m in fused.modules())
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        assert (p.dtype, p.stride(), p.requires_grad) == (q.dtype, q.stride(), q.requires_grad)
    y = fused.features[:2](torch.randn(X, dtype=torch.bfloat16))
    assert y.is_contiguous(memory_format=torch.channels_last)

    with torch.device("meta"):
        fused = fastalex.fuse(Plain())
    assert fused(torch.empty(X, device="meta")).shape == (2, 5)
    assert all(p.is_meta for p in fused.parameters())


@pytest.mark.parametrize("kind", [Plain, Functional])
def test_a_fused_model_compiles_as_one_graph(kind):
    fused = fastalex.fuse(kind().eval())
    x = torch.randn(X)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fused(x))


@pytest.mark.parametrize("kind", [Plain, Functional])
def test_a_fused_model_can_be_exported(kind):
    fused = fastalex.fuse(kind().eval())
    x = torch.randn(X)
    exported = torch.export.export(fused, (x,))
    assert "fastalex.conv2d_relu.default" in {str(node.target) for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x), fused(x))


def test_attributes_of_the_class_stay_usable():
    model = Functional()
    model.note = "mine"
    fused = fastalex.fuse(model)
    assert isinstance(fused, Functional)
    assert fused.note == "mine"
    fused.fc2 = nn.Linear(16, 3)
    assert fused(torch.randn(X)).shape == (2, 3)


def test_not_a_module():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
        fastalex.fuse("alexnet")

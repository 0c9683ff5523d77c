"""fastalex.LPIPS: gradients against float64, targets that are kept, and what PyTorch does with a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastalex
from fastalex import backend

NETS = ("alex", "vgg", "squeeze")


def images(*shape, requires_grad=False, dtype=torch.float32):
    return torch.rand(shape, dtype=dtype).requires_grad_(requires_grad)


def loss_of(net="alex", **options):
    """With a random trunk whose activations keep their size."""
    loss = fastalex.LPIPS(net=net, pnet_rand=True, **options)
    for parameter in loss.net.parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.1)
    return loss


def value_and_gradients(loss, *inputs, **options):
    distance = loss(*inputs, **options)
    wanted = [x for x in inputs if x.requires_grad]
    return [distance.detach(), *torch.autograd.grad(distance.sum(), wanted)]


@pytest.mark.parametrize("mode", ["auto", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", NETS)
def test_against_float64(net, mode):
    """Values within 1e-5, gradients within 1e-4 of the largest, of the formulas in float64."""
    loss = loss_of(net)
    a, b = images(2, 3, 35, 47, requires_grad=True), images(2, 3, 35, 47, requires_grad=True)
    with backend.use(mode):
        found = value_and_gradients(loss, a, b, normalize=True)
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    with backend.use("reference"):
        expected = value_and_gradients(copy.deepcopy(loss).double(), *wide, normalize=True)
    for one, other, limit in zip(found, expected, (1e-5, 1e-4, 1e-4), strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_a_target_that_stays(net, spatial):
    """features and distance are forward, to the bit, with a gradient to the image."""
    loss = loss_of(net, spatial=spatial)
    a, b = images(2, 3, 40, 36, requires_grad=True), images(2, 3, 40, 36)
    kept = loss.features(b, normalize=True)
    assert [f.shape[1] for f in kept] == loss.chns
    assert not any(f.requires_grad for f in kept)
    expected = value_and_gradients(loss, a, b, normalize=True)
    found = loss.distance(a, kept, normalize=True)
    assert torch.equal(found.detach(), expected[0])
    assert torch.equal(*torch.autograd.grad(found.sum(), a), expected[1])
    total, parts = loss.distance(a, kept, retPerLayer=True, normalize=True)
    torch.testing.assert_close(total, sum(parts), rtol=1e-5, atol=1e-7)


def test_batches_of_one_and_of_many():
    """A kept target for a batch, and one image against many targets; the gradient of the one is the sum."""
    loss = loss_of()
    many, one = images(3, 3, 40, 40, requires_grad=True), images(1, 3, 40, 40, requires_grad=True)
    for a, b in ((many, one), (one, many)):
        expected = loss(a, b.detach())
        found = loss.distance(a, loss.features(b))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for x, y in zip(torch.autograd.grad(found.sum(), a), torch.autograd.grad(expected.sum(), a), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5 * y.abs().max().item())


def test_the_same_image_is_at_distance_zero():
    loss, a = loss_of(), images(2, 3, 40, 40, requires_grad=True)
    distance, gradient = value_and_gradients(loss, a, a.detach())
    assert torch.equal(distance, torch.zeros(2, 1, 1, 1))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("net", NETS)
def test_no_nan_where_a_feature_is_zero(net):
    """PerceptualSimilarity#58: the package's gradient is NaN where all channels of a pixel are zero."""
    loss = loss_of(net)
    with torch.no_grad():
        for name, parameter in loss.net.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-0.05)
    a, b = images(1, 3, 40, 40), images(1, 3, 40, 40)
    a[:, :, :24] = loss.scaling_layer.shift  # scaled to zero, and the biases are negative
    a.requires_grad_()
    assert any((f.abs().sum(1) == 0).any() for f in loss.features(a))
    distance, gradient = value_and_gradients(loss, a, b)
    assert distance.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "needs",
    [
        (True, False),
        pytest.param((False, True), marks=pytest.mark.slow),
        pytest.param((True, True), marks=pytest.mark.slow),
    ],
)
def test_torch_compile(needs):
    """One graph, forward and backward equal to eager."""
    torch._dynamo.reset()
    loss = loss_of()
    inputs = [images(2, 3, 40, 36, requires_grad=need) for need in needs]
    expected = value_and_gradients(loss, *inputs, normalize=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(value_and_gradients(compiled, *inputs, normalize=True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    kept = loss.features(inputs[1])
    distance = torch.compile(loss.distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(distance(inputs[0], kept), loss.distance(inputs[0], kept), rtol=1e-6, atol=0)


def test_export_and_vmap_and_func():
    loss = loss_of()
    a, b = images(2, 3, 40, 36), images(2, 3, 40, 36)
    exported = torch.export.export(loss, (a, b))
    assert any(str(node.target) == "fastalex.lpips.default" for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(a, b), loss(a, b))
    apart = torch.vmap(lambda x, y: loss(x[None], y[None])[0, 0, 0, 0])(a, b)
    torch.testing.assert_close(apart, loss(a, b).flatten(), rtol=1e-5, atol=0)
    gradient = torch.func.grad(lambda x: loss(x, b).sum())(a)
    leaf = a.clone().requires_grad_()
    assert torch.equal(gradient, *torch.autograd.grad(loss(leaf, b).sum(), leaf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_autocast(dtype):
    """Convolutions in the lower precision, distances in float32; gradients arrive in the images' dtype."""
    loss = loss_of()
    a, b = images(2, 3, 40, 36, requires_grad=True), images(2, 3, 40, 36)
    exact = loss(a, b)
    with torch.autocast("cpu", dtype):
        distance = loss(a, b)
        assert all(f.dtype == dtype for f in loss.features(b))
    assert distance.dtype == torch.float32
    assert not torch.equal(distance, exact)
    torch.testing.assert_close(distance, exact, rtol=8 * torch.finfo(dtype).eps, atol=0)
    (gradient,) = torch.autograd.grad(1024 * distance.sum(), a)
    assert gradient.dtype == torch.float32
    (wanted,) = torch.autograd.grad(1024 * exact.sum(), a)
    assert (gradient - wanted).norm() < 16 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_lower_precision(dtype):
    """The module as a whole in that dtype: results are, too, and sums are not."""
    loss = loss_of()
    a, b = images(2, 3, 40, 36, requires_grad=True), images(2, 3, 40, 36)
    exact = loss(a, b)
    lower = loss.to(dtype)
    distance, gradient = value_and_gradients(lower, a.detach().to(dtype).requires_grad_(), b.to(dtype))
    assert distance.dtype == gradient.dtype == dtype
    torch.testing.assert_close(distance.float(), exact.detach(), rtol=16 * torch.finfo(dtype).eps, atol=0)


def test_what_is_kept_for_backward():
    """At most the features of both images and the codes, and nothing where no image needs a gradient."""
    loss = loss_of()
    a, b = images(1, 3, 64, 64, requires_grad=True), images(1, 3, 64, 64)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(a, b)
    constant = {t.untyped_storage().data_ptr() for t in [*loss.parameters(), *loss.buffers(), a]}
    features = sum(f.nbytes for f in loss.features(b))
    codes = 2 * (64 * 7 * 7 + 192 * 3 * 3)
    assert sum(size for pointer, size in kept.items() if pointer not in constant) <= 2 * features + codes + 1024
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(a.detach(), b)
    assert not kept


def test_a_frozen_network_is_the_default():
    assert not any(p.requires_grad for p in loss_of().parameters())
    tuned = fastalex.LPIPS(pnet_rand=True, pnet_tune=True, eval_mode=False)
    assert all(p.requires_grad for p in tuned.parameters())
    assert tuned.training


def test_dropout_in_training_only():
    loss = loss_of(eval_mode=False)
    a, b = images(2, 3, 40, 40), images(2, 3, 40, 40)
    assert not torch.equal(loss(a, b), loss(a, b))
    loss.eval()
    assert torch.equal(loss(a, b), loss(a, b))


def test_gradients_of_the_weights_agree_with_the_formulas():
    loss = loss_of(use_dropout=False, eval_mode=False, pnet_tune=True)
    a, b = images(2, 3, 40, 40, requires_grad=True), images(2, 3, 40, 40)
    parameters = [a, *loss.parameters()]
    found = torch.autograd.grad(loss(a, b).sum(), parameters)
    with backend.use("reference"):
        expected = torch.autograd.grad(loss(a, b).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_second_derivatives_are_refused_and_forward_mode_too():
    loss, a, b = loss_of(), images(1, 3, 40, 40, requires_grad=True), images(1, 3, 40, 40)
    (gradient,) = torch.autograd.grad(loss(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="lpips has no second derivative"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="lpips has no forward-mode derivative"):
        torch.func.jvp(lambda x: loss(x, b), (a.detach(),), (b,))


def test_two_runs_are_equal_to_the_bit():
    loss, a, b = loss_of(), images(2, 3, 64, 64, requires_grad=True), images(2, 3, 64, 64)
    for one, other in zip(value_and_gradients(loss, a, b), value_and_gradients(loss, a, b), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :, ::2], lambda x: x.transpose(2, 3), lambda x: x.flip(1), lambda x: x[:1].expand(2, -1, -1, -1)],
)
def test_any_memory(view):
    loss, base = loss_of(), images(2, 3, 80, 80, requires_grad=True)
    b = images(*view(base).shape)
    expected = value_and_gradients(loss, view(base).detach().contiguous().requires_grad_(), b)
    distance = loss(view(base), b)
    torch.testing.assert_close(distance.detach(), expected[0], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(distance.sum(), base)
    assert gradient.shape == base.shape
    last = base.detach().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss(view(last), b), distance, rtol=1e-6, atol=0)


def test_empty_batches():
    loss = loss_of()
    a = torch.zeros(0, 3, 40, 40, requires_grad=True)
    distance = loss(a, a.detach())
    assert distance.shape == (0, 1, 1, 1)
    assert torch.autograd.grad(distance.sum(), a)[0].shape == a.shape


def test_copies_and_files(tmp_path):
    loss, a, b = loss_of(), *images(2, 1, 3, 40, 40)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(a, b), loss(a, b))
    torch.save(loss.state_dict(), tmp_path / "loss.pth")
    fresh = fastalex.LPIPS(pnet_rand=True, pretrained=False)
    fresh.load_state_dict(torch.load(tmp_path / "loss.pth", weights_only=True))
    assert torch.equal(fresh.requires_grad_(False)(a, b), loss(a, b))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        ((2, 3, 40, 40), (3, 3, 40, 40), ValueError, "one batch, or one of them a batch of 1, got 2 and 3"),
        ((2, 4, 40, 40), (2, 3, 40, 40), ValueError, r"in0 must be \(N, 3, H, W\), .* got shape \(2, 4, 40, 40\)"),
        ((2, 3, 40, 40), (2, 3, 40, 30), ValueError, r'in1 must be at least 31 x 31 for net="alex", got shape'),
        ((1, 2, 3, 40, 40), (2, 3, 40, 40), ValueError, r"in0 must be .* got shape \(1, 2, 3, 40, 40\)"),
        ((2, 3, 40, 40), (2, 3, 40, 80), ValueError, "of one size"),
    ],
)
def test_bad_images(a, b, error, message):
    with pytest.raises(error, match=message):
        loss_of()(torch.zeros(a), torch.zeros(b))


def test_bad_dtypes_devices_and_features():
    loss, a = loss_of(), images(1, 3, 40, 40)
    with pytest.raises(RuntimeError, match=r"in0 is torch\.float64, the weights are torch\.float32"):
        loss(a.double(), a)
    with pytest.raises(RuntimeError, match="in0 is on meta, the weights are on cpu"):
        loss(a.to("meta"), a)
    with pytest.raises(ValueError, match=r"features must be 5 maps \(N, 64, 9, 9\), .* got \[\]"):
        loss.distance(a, [])
    with pytest.raises(ValueError, match="image has a batch of 2, features have 3"):
        loss.distance(a.expand(2, -1, -1, -1), loss.features(a.expand(3, -1, -1, -1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": "resnet"}, "net must be one of alex, vgg, squeeze, got 'resnet'"),
        ({"version": "0.0"}, r"version must be '0\.1', got '0\.0'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastalex.LPIPS(pnet_rand=True, **options)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"trunk must be an existing file, got '.*none\.pth'"):
        fastalex.LPIPS(trunk=tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="model_path must be an existing file"):
        fastalex.LPIPS(pnet_rand=True, model_path=tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"lack features\.0\.bias: they are not of alex"):
        fastalex.LPIPS(trunk=tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has no weights lin0 for the 64 channels of alex"):
        fastalex.LPIPS(pnet_rand=True, model_path=tmp_path / "other.pth")


@pytest.mark.parametrize("argument", ["trunk", "model_path"])
def test_damaged_files_are_named(argument, tmp_path):
    path = tmp_path / "damaged.pth"
    path.write_text("junk")
    with pytest.raises(ValueError, match=r"damaged\.pth holds no weights that PyTorch reads"):
        fastalex.LPIPS(pnet_rand=argument != "trunk", **{argument: path})
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"damaged\.pth holds a list, not a state_dict"):
        fastalex.LPIPS(pnet_rand=argument != "trunk", **{argument: path})


def test_trunk_weights_as_torchvision_has_them(tmp_path, monkeypatch):
    """From a file, and by the download that torch's hub keeps."""
    loss = loss_of("squeeze")
    state = {"features." + name.partition(".")[2]: value for name, value in loss.net.state_dict().items()}
    state["classifier.1.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "squeezenet.pth")
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: asked.append(url) or state)
    a, b = images(2, 1, 3, 40, 40)
    for other in (fastalex.LPIPS(net="squeeze", trunk=tmp_path / "squeezenet.pth"), fastalex.LPIPS(net="squeeze")):
        assert torch.equal(other(a, b), loss(a, b))
    assert asked == ["https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"]


def test_distributed_data_parallel():
    """A generator with the loss inside, as people wrap them: frozen parameters are nothing to reduce."""

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.loss = loss_of()

        def forward(self, image, target):
            return self.loss(self.conv(image), target).mean()

    a, b = images(2, 3, 40, 40), images(2, 3, 40, 40)
    plain = Generator()
    expected = torch.autograd.grad(plain(a, b), plain.conv.weight)[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(plain)(a, b).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(plain.conv.weight.grad, expected)

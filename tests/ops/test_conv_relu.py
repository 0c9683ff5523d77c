"""The operators behind conv2d_relu and conv2d_relu_max_pool2d."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as torch_functional
from operator_checks import LAYOUTS, MODES, check_against_reference, check_citizenship, tensor
from tolerances import assert_matches

from fastalex import backend, choices, ops
from fastalex import functional as F
from fastalex.gpu import dispatch
from fastalex.gpu.convolution import CONV2D_INPUT_GRAD, CONV2D_RELU, CONV2D_WEIGHT_GRAD
from fastalex.kernels.registers import interpreting
from fastalex.ops import conv_relu_pool

GEOMETRY = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
NORM = F.ResponseNorm(5, 0.5, 0.75, 2.0)


def inputs(dtype=torch.float32, layout=torch.contiguous_format):
    return [
        tensor(2, 8, 9, 11, dtype=dtype, layout=layout),
        tensor(16, 4, 3, 3, dtype=dtype, layout=layout, scale=0.3),
        tensor(16, dtype=dtype),
    ]


def conv(x, w, b):
    return F.conv2d_relu(x, w, b, **GEOMETRY)


def magnitudes(x, w, b):
    """Sums of absolute values, with incoming gradients below five standard deviations."""
    x, w, b = (t.detach().double().abs().requires_grad_() for t in (x, w, b))
    output = torch_functional.conv2d(x, w, b, **GEOMETRY)
    return [output.detach(), *torch.autograd.grad(output, (x, w, b), torch.full_like(output, 5.0))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_reference(mode, layout):
    tensors = inputs(layout=LAYOUTS[layout])
    # the longest sum is the bias gradient's, over 2 x 9 x 5 pixels
    check_against_reference(conv, tensors, terms=90, magnitudes=magnitudes(*tensors), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [None, NORM], ids=["pool", "lrn pool"])
def test_stage(mode, layout, norm):
    """The stage as one node equals its parts, and gives the gradients of torch's modules in float64."""
    x, w, b = inputs(layout=LAYOUTS[layout])
    with backend.use(mode):
        y = F.conv2d_relu_max_pool2d(x, w, b, **GEOMETRY, norm=norm)
        grad = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, w, b), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    z = torch.relu(torch_functional.conv2d(*wide, **GEOMETRY))
    z = z if norm is None else torch_functional.local_response_norm(z, *norm[:4])
    expected = torch_functional.max_pool2d(z, 3, 2)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    sums = magnitudes(x, w, b)
    assert_matches(y.detach(), expected.detach(), terms=50, magnitude=sums[0].max().expand(y.shape))
    for actual, wanted, magnitude in zip(grads, expected_grads, sums[1:], strict=True):
        # each activation's gradient is a sum of up to four pooled ones and five neighbours' shares
        assert_matches(actual, wanted, terms=120, magnitude=4 * 5 * magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_citizenship(layout):
    check_citizenship(conv, inputs(layout=LAYOUTS[layout]))
    check_citizenship(
        lambda x, w, b: F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM), inputs(layout=LAYOUTS[layout])
    )


def test_channels_last_if_either_is():
    x, w, b = inputs()
    assert conv(x, w.contiguous(memory_format=torch.channels_last), b).is_contiguous(memory_format=torch.channels_last)
    assert conv(x, w, b).is_contiguous()


def test_opcheck():
    for layout in LAYOUTS.values():
        x, w, b = inputs(layout=layout)
        torch.library.opcheck(ops.conv2d_relu, (x, w, b, [1, 2, 1, 0, 1, 1, 2]))
        torch.library.opcheck(ops.conv2d_relu, (x, w, None, [1, 2, 1, 0, 1, 1, 2]))
        stage = [1, 1, 1, 1, 1, 1, 2, 3, 3, 2, 2]
        torch.library.opcheck(ops.conv2d_relu_pool, (x, w, b, stage, list(NORM), True))
        torch.library.opcheck(ops.conv2d_relu_pool, (x, w, b, stage, [], True))
        frozen = (x.detach(), w.detach(), b.detach())
        torch.library.opcheck(ops.conv2d_relu_pool, (*frozen, stage, list(NORM), False))


def test_gradcheck():
    x, w, b = (t.detach().double().requires_grad_() for t in inputs())
    assert torch.autograd.gradcheck(conv, (x[:1, :, :5, :5].detach().requires_grad_(), w, b))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed(needs):
    tensors = [t.requires_grad_(need) for t, need in zip(inputs(), needs, strict=True)]
    conv(*tensors).sum().backward()
    F.conv2d_relu_max_pool2d(*tensors, **GEOMETRY, norm=NORM).sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)


def test_pooling_stage_keeps_no_activation():
    """Without LRN the codes are enough: input, weight and one byte per window."""
    saved = []
    x, w, b = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2)
    shapes = sorted(tuple(t.shape) for t in saved if t.numel())
    assert shapes == sorted([tuple(x.shape), tuple(w.shape), (2, 16, 4, 5)])


@pytest.fixture
def block_of_three(monkeypatch):
    """-> the batches that the kernels of a stage were called with, for `inputs` of float32 in blocks of at most 3."""
    batches = []
    whole = conv_relu_pool.forward
    monkeypatch.setattr(conv_relu_pool, "BLOCK_BYTES", 3 * 16 * 9 * 11 * 4)
    monkeypatch.setattr(
        conv_relu_pool, "forward", lambda x, *rest, **options: batches.append(x.shape[0]) or whole(x, *rest, **options)
    )
    return batches


@pytest.mark.parametrize(
    ("images", "threads", "blocks"),
    [(0, 1, [0]), (1, 1, [1]), (3, 1, [3]), (4, 1, [2, 2]), (7, 1, [3, 3, 1]), (7, 2, [3, 3, 1]), (7, 5, [7])],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [list(NORM), []], ids=["lrn pool", "pool"])
@pytest.mark.parametrize("window", [3, 2])  # LRN has no fused form with 2
def test_inference_in_blocks_of_images(window, norm, layout, images, threads, blocks, block_of_three, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, w, b = (t.detach() for t in inputs(layout=LAYOUTS[layout]))
    x = tensor(images, *x.shape[1:], layout=LAYOUTS[layout]).detach()
    parameters = [1, 1, 1, 1, 1, 1, 2, window, window, 2, 2], norm
    y, activation, codes = ops.conv2d_relu_pool(x, w, b, *parameters, False)
    assert block_of_three == blocks
    assert activation.numel() == codes.numel() == 0
    parts = [ops.conv2d_relu_pool(part, w, b, *parameters, True)[0] for part in x.split(blocks[0])]
    assert torch.equal(y, torch.cat(parts))
    assert y.stride() == ops.conv2d_relu_pool(x, w, b, *parameters, True)[0].stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_every_dtype(dtype, block_of_three):
    x, w, b = (t.detach().to(dtype) for t in inputs(layout=torch.channels_last))
    x = torch.cat([x] * 4)[1:]  # seven
    y = F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM)
    expected = {torch.float64: [2, 2, 2, 1], torch.float32: [3, 3, 1]}.get(dtype, [4, 3])
    assert block_of_three == expected
    parts = [F.conv2d_relu_max_pool2d(part, w, b, 1, 1, 1, 2, norm=NORM) for part in x.split(expected[0])]
    assert y.dtype == dtype
    assert torch.equal(y, torch.cat(parts))


def test_blocks_under_compile_and_vmap(block_of_three):
    x, w, b = (t.detach() for t in inputs(layout=torch.channels_last))
    x = torch.cat([x] * 4)

    def stage(x):
        return F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM)

    y = stage(x)
    assert torch.equal(torch.compile(stage, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(torch.func.vmap(stage)(torch.stack([x, x]))[1], y)
    assert block_of_three == [3, 3, 2] * 4


def test_only_inference_runs_in_blocks(block_of_three):
    x, w, b = inputs()
    x = torch.cat([x] * 4)
    F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM).sum().backward()
    with torch.no_grad(), backend.use("triton"):  # one launch for all images
        F.conv2d_relu_max_pool2d(x, w, b, 1, 1, 1, 2, norm=NORM)
    assert block_of_three == [8, 8]


def test_autocast_runs_in_its_dtype():
    x, w, b = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, w, b)
        stage = F.conv2d_relu_max_pool2d(x, w, b, **GEOMETRY)
    assert y.dtype == stage.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_empty_batch():
    x, w, b = inputs()
    y = conv(x[:0], w, b)
    assert y.shape == (0, 16, 9, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (9, 11)}, ValueError, r"input must be \(N, C, H, W\).*, got shape \(9, 11\)"),
        ({"x": (2, 6, 9, 11)}, ValueError, "input has 6 channels, weight .* with groups=2 takes 8"),
        ({"b": (15,)}, ValueError, r"bias must have shape \(16,\)"),
        ({"x": (2, 8, 0, 11)}, ValueError, "larger than the padded input height 2"),
    ],
)
def test_bad_shapes(change, error, message):
    shapes = {"x": (2, 8, 9, 11), "w": (16, 4, 3, 3), "b": (16,), **change}
    with pytest.raises(error, match=message):
        conv(*(torch.randn(s) for s in shapes.values()))


def test_mixed_dtypes_and_devices():
    x, w, b = (t.detach() for t in inputs())
    with pytest.raises(RuntimeError, match=r"weight is torch\.float16 but input is torch\.float32"):
        conv(x, w.half(), b)
    with pytest.raises(RuntimeError, match="bias is on meta but input is on cpu"):
        conv(x, w, b.to("meta"))


# ---- the candidates


@pytest.fixture(autouse=True)
def exact_products():
    """Products of fp32 in fp32: TF32 has other bounds."""
    settings = torch.backends.cudnn.conv
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    yield
    settings.fp32_precision = before


FORCED = [
    (operation.name, name)
    for operation in (CONV2D_RELU, CONV2D_WEIGHT_GRAD, CONV2D_INPUT_GRAD)
    for name in operation.candidates
    if name != "cudnn_convolution_relu"  # needs cuDNN
]


def problem(name):
    """(x, w, b) and the geometry of a layer that this candidate takes, with a rest and a border."""
    if name.startswith("space_to_depth"):  # conv1: images as they come
        x, w, geometry = (2, 3, 10, 13), (16, 3, 7, 5), (4, (2, 1), 1, 1)
    elif name.endswith("descriptors"):
        x, w, geometry = (3, 32, 3, 4), (32, 16, 3, 2), (1, 1, 1, 2)
    else:
        x, w, geometry = (3, 12, 6, 4), (16, 6, 3, 2), ((2, 1), (1, 0), 1, 2)
    image = tensor(*x, layout=torch.contiguous_format if x[1] == 3 else torch.channels_last)
    return (image, tensor(*w, layout=torch.channels_last, scale=0.3), tensor(w[0])), geometry


@pytest.mark.parametrize(("operation", "name"), FORCED)
def test_every_candidate(operation, name):
    """Forward and backward as the reference's, in channels_last, and the same bits again."""
    if operation != "conv2d_relu" and "descriptors" in name:
        # these refuse exact fp32; the interpreter multiplies exactly all the same
        if not interpreting():
            pytest.skip("TF32 has other bounds")
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    tensors, geometry = problem(name)
    wide = [t.detach().double().abs().requires_grad_() for t in tensors]
    output = torch_functional.conv2d(*wide, *geometry)
    sums = [output.detach(), *torch.autograd.grad(output, wide, torch.full_like(output, 5.0))]

    def conv(x, w, b):
        return F.conv2d_relu(x, w, b, *geometry)

    with backend.use("triton"), dispatch.force(operation, name):
        assert f"{operation} by {name} (forced)" in choices.explain(conv, *tensors)
        y, again = conv(*tensors), conv(*tensors)
        grad = torch.randn_like(y)
        results, twins = (
            (y, *torch.autograd.grad(y, tensors, grad)),
            (again, *torch.autograd.grad(again, tensors, grad)),
        )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(results, twins, strict=True))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.relu(torch_functional.conv2d(*wide, *geometry))
    wanted = (expected, *torch.autograd.grad(expected, wide, grad.double()))
    terms = max(tensors[1][0].numel(), y[:, 0].numel()) + 1
    for a, b, magnitude in zip(results, wanted, sums, strict=True):
        assert_matches(a.detach(), b.detach(), terms=terms, magnitude=magnitude)


def test_a_stage_takes_the_candidate():
    tensors, geometry = problem("space_to_depth")
    with backend.use("triton"), dispatch.force("conv2d_relu", "space_to_depth_split_k"):
        stage = F.conv2d_relu_max_pool2d(*tensors, *geometry, kernel_size=2)
        assert torch.equal(stage, torch_functional.max_pool2d(F.conv2d_relu(*tensors, *geometry), 2, 2))


@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding"),
    [((227, 227), 11, 4, 0), ((224, 224), 11, 4, 2), ((25, 33), 3, 2, 1), ((17, 18), 8, 8, 4), ((30, 29), 11, 4, 0)],
    ids=str,
)
def test_space_to_depth_covers_every_rest(image, kernel, stride, padding):
    """What the windows leave over at the bottom and the right is cropped or padded: sizes of conv1, and others."""
    x = torch.randn(1, 3, *image)
    w = torch.randn(8, 3, kernel, kernel).to(memory_format=torch.channels_last)
    with backend.use("triton"), dispatch.force("conv2d_relu", "space_to_depth_library"):
        y = F.conv2d_relu(x, w, None, stride, padding)
    expected = torch_functional.conv2d(x.double(), w.double(), None, stride, padding)
    magnitude = torch_functional.conv2d(x.double().abs(), w.double().abs(), None, stride, padding)
    assert_matches(y, torch.relu(expected), terms=3 * kernel**2, magnitude=magnitude)


@pytest.mark.parametrize(
    ("operation", "name", "x", "w", "geometry", "reason"),
    [
        ("conv2d_relu", "triton_spatial", (1, 8, 5, 5), (8, 8, 3, 3), (1, 1, 1, 1), "takes channels_last"),
        ("conv2d_relu", "space_to_depth_library", (1, 3, 8, 8), (8, 3, 3, 3), (3, 0, 1, 1), "a power of two above 1"),
        ("conv2d_relu", "space_to_depth_library", (1, 3, 9, 9), (8, 3, 2, 2), (2, 0, 2, 1), "dilation 1 and one group"),
        ("conv2d_relu", "space_to_depth_library", (1, 99, 8, 8), (8, 99, 2, 2), (2, 0, 1, 1), "at most 64 channels"),
        ("conv2d_relu", "space_to_depth_library", (1, 3, 8, 8), (8, 3, 2, 2), (2, 0, 1, 1), "takes channels_last"),
        ("conv2d_relu", "cudnn_convolution_relu", (1, 8, 5, 5), (8, 8, 3, 3), (1, 1, 1, 1), "needs cuDNN"),
    ],
)
def test_what_a_candidate_refuses(operation, name, x, w, geometry, reason):
    x, w = torch.randn(x), torch.randn(w)
    with backend.use("triton"), dispatch.force(operation, name), pytest.raises(RuntimeError, match=reason):
        F.conv2d_relu(x, w, None, *geometry)


@pytest.mark.parametrize("operation", [CONV2D_RELU, CONV2D_INPUT_GRAD, CONV2D_WEIGHT_GRAD], ids=lambda o: o.name)
def test_descriptors_need_hopper(operation, monkeypatch):
    on_ampere = SimpleNamespace(is_cuda=True, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found = [c for name, c in operation.candidates.items() if "descriptors" in name]
    assert found
    for candidate in found:
        assert "sm_90" in candidate.unsupported(on_ampere)


def test_cublaslts_epilogue_needs_a_gpu():
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    forced = dispatch.force("linear_relu", "cublaslt_epilogue")
    with backend.use("triton"), forced, pytest.raises(RuntimeError, match="cublaslt_epilogue: needs a GPU"):
        F.linear_relu_dropout(x, w, p=0.0)


def test_images_take_space_to_depth_and_other_layers_the_library():
    last = {"memory_format": torch.channels_last}
    for channels, stride, expected in ((3, 4, "space_to_depth_library"), (3, 1, "library"), (8, 2, "library")):
        x, w = torch.randn(1, channels, 16, 16), torch.randn(8, channels, 3, 3).to(**last)
        args = (x, w, None, [stride] * 2, [0, 0], [1, 1], 1)
        assert dispatch.choose(CONV2D_RELU, *args).candidate.name == expected
    # in memory that nobody made channels_last nothing is regrouped
    args = (torch.randn(1, 3, 16, 16), torch.randn(8, 3, 3, 3), None, [4, 4], [0, 0], [1, 1], 1)
    assert dispatch.choose(CONV2D_RELU, *args).candidate.name == "library"


def test_a_wrong_candidate_is_noticed(monkeypatch):
    """A convolution without its last tap: the comparison with the reference sees it."""
    right = CONV2D_RELU.candidates["library"]

    def without_last_tap(x, w, *rest):
        taps = torch.ones_like(w)
        taps[..., -1, -1] = 0
        return right.run(x, w * taps, *rest)

    wrong = dispatch.Candidate("library", without_last_tap, right.unsupported)
    monkeypatch.setitem(CONV2D_RELU.candidates, "library", wrong)
    with pytest.raises(AssertionError, match="elements differ"):
        test_every_candidate("conv2d_relu", "library")


@pytest.mark.parametrize("geometry", [((1, 4), (0, 2), 2), ((1, 2), (0, 1), 1), ((3, 3), (2, 2), 1)])
def test_weight_gradient_of_images_narrower_than_a_step(geometry):
    """Where oneDNN reads what lies behind a padded input: another number in every call."""
    stride, padding, groups = geometry
    narrow = stride[1] - 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 10, 13, narrow), generator=generator).double()
    w = torch.randint(-1, 2, (6, 10 // groups, 2, padding[1] + 1), generator=generator).double().requires_grad_()
    out = torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups).relu()
    (expected,) = torch.autograd.grad(out.sum(), w)
    last = w.detach().bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    for filling in range(5):
        for size in (10, 100, 1000, 5000):
            torch.full((size,), 3.0 + filling, dtype=torch.bfloat16)  # what the allocator hands out next
        out = F.conv2d_relu(x.bfloat16(), last, None, stride, padding, 1, groups)
        (grad,) = torch.autograd.grad(out.float().sum(), last)
        assert torch.equal(grad.double(), expected)

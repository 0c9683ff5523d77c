"""The catalogue is what the models launch, and its kernels compile to the code that they were designed for."""

import inspect
import itertools
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from fastalex import LPIPS, backend, cli
from fastalex.alexnet import AlexNet
from fastalex.inspection import catalog, compiler, machine_code, traffic
from fastalex.inspection.chips import CHIPS, times
from fastalex.kernels.bias_relu import bias_relu_
from fastalex.kernels.registers import interpreting
from fastalex.variants import VARIANTS

# ---- the catalogue


def signature(launch):
    """What must be equal for two launches to be the same."""
    described = [
        (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value for value in launch.args
    ]
    return repr((launch.name, launch.grid, described, sorted(launch.constants.items())))


def cataloged(variant, batch, wanted):
    entries = [
        entry
        for entry in catalog.ENTRIES.values()
        if isinstance(entry, catalog.Entry)
        and (entry.variant, entry.dtype, entry.layout) == (variant, "fp32", "channels_last")
        and wanted(entry)
    ]
    return Counter(signature(launch) for entry in entries for launch in catalog.launches(entry, batch))


@pytest.mark.skipif(not interpreting(), reason="the models run on the CPU here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_catalogue_is_what_the_models_launch(variant):
    batch = 2
    model = AlexNet(10, variant=variant)
    images = torch.zeros(batch, 3, VARIANTS[variant].crop, VARIANTS[variant].crop)
    with backend.use("triton"):
        with catalog.recording() as launches:
            model(images).sum().backward()
        assert Counter(map(signature, launches)) == cataloged(
            variant, batch, lambda entry: entry.direction != "inference"
        )

        model.eval()
        with catalog.recording() as launches, torch.no_grad():
            model(images)

    def in_inference(entry):
        # convolutions and LRN do the same in training, and so does a linear layer without dropout
        operations = ("bias_relu", "lrn", "space_to_depth")
        same = entry.direction == "forward" and entry.operation in operations and not entry.dropout
        return entry.direction == "inference" or same

    assert Counter(map(signature, launches)) == cataloged(variant, batch, in_inference)


def test_a_wrong_entry_is_noticed(monkeypatch):
    name = "paper/conv2/lrn_max_pool/forward/fp32/channels_last"
    before = cataloged("paper", 2, lambda entry: True)
    wrong = catalog.replace(catalog.ENTRIES[name], norm=(5, 1e-4, 0.75, 2.0, 1))
    monkeypatch.setitem(catalog.ENTRIES, name, wrong)
    assert cataloged("paper", 2, lambda entry: True) != before


# ---- machine code

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])

# name: (instructions per element, DRAM bytes per element) of the design, for fp16
DESIGN = {
    "caffenet/conv1/lrn/forward": (13.1, 4.00),
    "caffenet/conv1/lrn/backward": (29.6, 6.00),
    # one column per item, which a GPU does faster than fewer instructions for three; blocks of 9 rows of 27
    "paper/conv1/lrn_max_pool/forward": (20.3, 2.72),
    # blocks of 7 rows of 13: 15 of 14 rows are computed, where conv1's are 19 of 18
    "paper/conv2/lrn_max_pool/forward": (20.3 * (30 / 26) / (57 / 54), 2.72),
    # partial sums of the bias gradient, written and read: 4 bytes for 16 and for 28 pixels, borders included
    "paper/conv1/lrn_max_pool/backward": (30.5, 4.72 + 2 * 0.26),
    "paper/conv2/lrn_max_pool/backward": (30.5, 4.72 + 2 * 0.16),
    # one element at a time: bound by DRAM all the same
    "paper/conv5/max_pool/forward": (11.7, 2.72),
    # 13 rows and columns in 7 pairs, 7 pairs in 8 lanes
    "paper/conv5/max_pool/backward": (11.4 * (14 / 13) ** 2 * 8 / 7, 2.72),
}
CASES = [
    *((name, dtype, "sm_90") for name in DESIGN for dtype in catalog.DTYPES),
    *((name, "fp16", target) for name in DESIGN for target in compiler.TARGETS if target != "sm_90"),
]


def is_slow(name, dtype, target):
    return "conv2" in name and (dtype, target) != ("fp16", "sm_90")


def marked(cases):
    return [pytest.param(*case, marks=pytest.mark.slow if is_slow(*case) else ()) for case in cases]


def request_of(name, dtype, target):
    return f"{name}/{dtype}/channels_last", target


TRAFFIC = [pytest.param(name, "fp16", "traffic", marks=pytest.mark.slow if "conv2" in name else ()) for name in DESIGN]


@pytest.fixture(scope="module")
def answers(request):
    """{(name, dtype, target): launches} of all tests of this file that were selected, compiled together."""
    selected = set()
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec") and "target" in item.callspec.params:
            selected.add(tuple(item.callspec.params[key] for key in ("name", "dtype", "target")))
    found = compiler.results([request_of(*case) for case in selected])
    return {case: found[request_of(*case)] for case in selected}


@pytest.mark.parametrize(("name", "dtype", "target"), marked(CASES))
def test_machine_code(name, dtype, target, answers):
    launches = answers[name, dtype, target]
    assert "error" not in launches
    code = launches[0]
    assert code["spills"] == code["stack"] == 0
    # before 3.7, Triton exchanged values between lanes through shared memory, as these kernels' backward passes do
    exchanges = "lrn" in name and "backward" in name and TRITON < (3, 7)
    if target == "gfx942":
        # max-pool is cut for 32 lanes: half a vector per thread and 128 bytes of shared memory with 64
        assert code["shared"] <= 128 or exchanges
        assert {"16", "8"} & set(code["loads"])
        return
    assert code["shared"] == 0 or exchanges
    assert "16" in code["loads"]
    assert "16" in code["stores"]
    assert min(map(int, code["loads"])) >= 4
    assert min(map(int, code["stores"])) >= 4
    if dtype == "fp16" and target == "sm_90" and not exchanges:
        assert code["instructions"] <= 1.1 * DESIGN[name][0]


def floor(entry):
    """Bytes per element that cannot be avoided: each tensor once."""
    size = catalog.DTYPES[entry.dtype].itemsize
    if entry.operation == "lrn":
        return {"forward": 2, "backward": 3}[entry.direction] * size
    windows = ((entry.side - 3) // 2 + 1) ** 2 / entry.side**2
    tensors = 2 if (entry.operation, entry.direction) == ("lrn_max_pool", "backward") else 1
    return tensors * size + windows * (size + 1)


@pytest.mark.parametrize(("name", "dtype", "target"), TRAFFIC)
def test_traffic(name, dtype, target, answers):
    launches = answers[name, dtype, target]
    assert "error" not in launches
    moved = sum(launch["read"] + launch["written"] for launch in launches)
    assert floor(catalog.ENTRIES[request_of(name, dtype, target)[0]]) <= moved <= 1.05 * DESIGN[name][1]


# ---- LPIPS

LPIPS_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
# Modelled time in units of DRAM's.  A B200 reads 16-bit maps faster than it issues what the windows of an overlapping
# pool cost, and than what turns channels into pixels.
LPIPS_BOUND = {
    ("lpips-alex/relu1/lpips/backward", "sm_100"): 1.45,
    ("lpips-alex/relu2/lpips/backward", "sm_100"): 1.45,
    ("lpips-alex/images/lpips/forward", "sm_100"): 1.4,
}
LPIPS_NAMES = sorted({name.rsplit("/", 2)[0] for name, entry in catalog.ENTRIES.items() if entry.operation == "lpips"})
LPIPS_QUICK = ("lpips-alex/relu1/lpips/forward", "lpips-alex/relu1/lpips/backward", "lpips-alex/relu3/lpips/backward")
LPIPS_CASES = [
    pytest.param(*case, marks=() if case[1:] == ("fp16", "sm_90") and case[0] in LPIPS_QUICK else pytest.mark.slow)
    for case in itertools.product(LPIPS_NAMES, catalog.DTYPES, LPIPS_TARGETS)
]


def lpips_floor(entry):
    """Bytes per element of one map that cannot be avoided: each tensor once."""
    size = catalog.DTYPES[entry.dtype].itemsize
    if entry.layer == "images":
        return 4 + size
    if entry.direction == "forward":
        return 2 * size
    if entry.pool is None:
        return (4 if entry.above else 3) * size
    kernel, stride = entry.pool
    return 3 * size + ((entry.side - kernel) // stride + 1) ** 2 / entry.side**2 * (size + 1)


@pytest.mark.parametrize(("name", "dtype", "target"), LPIPS_CASES)
def test_lpips(name, dtype, target, answers):
    """Nothing is spilt, maps are read in whole vectors, and DRAM sets the pace."""
    launches = answers[name, dtype, target]
    assert "error" not in launches
    code = launches[0]
    assert code["spills"] == code["stack"] == 0
    assert code["stores"].keys() & {"16", "4"}
    entry = catalog.ENTRIES[f"{name}/{dtype}/channels_last"]
    if entry.layer != "images":
        assert "16" in code["loads"]
        assert min(map(int, code["loads"])) >= 4
    (chip, *_) = (chip for chip in CHIPS if chip.target == target)
    elements = entry.image_elements * entry.batch
    pipes = {pipe: number * elements for pipe, number in code["pipes"].items()}
    modelled = times(chip, pipes=pipes, dram_bytes=lpips_floor(entry) * elements, flops=0, dtype=dtype)
    allowed = 1.05 if dtype == "fp32" else LPIPS_BOUND.get((name, target), 1.05)
    assert max(modelled.values()) <= allowed * modelled["DRAM"]


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        pytest.param(name, dtype, "traffic", marks=() if "relu3" in name and dtype == "fp16" else pytest.mark.slow)
        for name in LPIPS_NAMES
        # the interpreter takes minutes for more
        if catalog.ENTRIES[f"{name}/fp16/channels_last"].image_elements < 2**19
        for dtype in ("fp16", "fp32")
    ],
)
def test_lpips_traffic(name, dtype, target, answers):
    launches = answers[name, dtype, target]
    assert "error" not in launches
    moved = sum(launch["read"] + launch["written"] for launch in launches)
    least = lpips_floor(catalog.ENTRIES[f"{name}/{dtype}/channels_last"])
    assert least <= moved <= 1.05 * least


@pytest.mark.skipif(not interpreting(), reason="the model runs on the CPU here")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_catalogue_is_what_lpips_launches(net):
    """One pair of 256 x 256; in the model the maps of all layers share one tensor of partial sums."""
    loss = LPIPS(net=net, pnet_rand=True)
    image, target = torch.zeros(2, 1, 3, 256, 256)
    with backend.use("triton"), catalog.recording() as launches:
        loss(image.requires_grad_(), target, normalize=True).sum().backward()

    def counted(launches):
        return Counter(
            (launch.name, launch.grid, *((tuple(x.shape), x.dtype) for x in launch.args[:2]), *constants(launch))
            for launch in launches
            if launch.name.startswith("lpips_")
        )

    def constants(launch):
        return sorted((key, value) for key, value in launch.constants.items())

    entries = [
        entry
        for entry in catalog.ENTRIES.values()
        if isinstance(entry, catalog.LpipsEntry) and (entry.variant, entry.dtype) == (f"lpips-{net}", "fp32")
    ]
    expected = counted(launch for entry in entries for launch in catalog.launches(entry, 1))
    found = counted(launches)
    # the second picture, and for VGG16 the pictures that AlexNet's entries stand for
    pictures = [key for key in found if key[0] == "lpips_images_kernel"]
    assert sum(found[key] for key in pictures) == 3
    assert {key for key in expected if key[0] == "lpips_images_kernel"} <= set(pictures)
    assert {key: n for key, n in found.items() if key not in pictures} == {
        key: n for key, n in expected.items() if key not in pictures
    }


# ---- SGD

SGD_CASES = [
    pytest.param("paper/parameters/sgd/step", *case, marks=() if case == ("bf16", "sm_90") else pytest.mark.slow)
    for case in itertools.product(("bf16", "fp32"), compiler.TARGETS)
]


@pytest.mark.parametrize(("name", "dtype", "target"), SGD_CASES)
def test_sgd(name, dtype, target, answers):
    """Nothing is spilt or exchanged, vectors are whole, and DRAM sets the pace where fp64 is no afterthought."""
    assert "error" not in answers[name, dtype, target]
    [code] = answers[name, dtype, target]
    assert code["spills"] == code["stack"] == code["shared"] == 0
    assert "16" in code["loads"]
    assert "16" in code["stores"]
    if dtype == "bf16":
        # four of bf16 and of the lower halves; the 2 bytes are those of odd addresses
        assert "8" in code["loads"]
        assert "8" in code["stores"]
    if target in ("sm_80", "sm_90", "sm_100"):
        entry = catalog.ENTRIES[f"{name}/{dtype}/channels_last"]
        pipes = {pipe: number * entry.image_elements for pipe, number in code["pipes"].items()}
        for chip in (chip for chip in CHIPS if chip.target == target):
            moved = SGD_BYTES[dtype] * entry.image_elements
            modelled = times(chip, pipes=pipes, dram_bytes=moved, flops=0, dtype=dtype)
            assert max(modelled.values()) == modelled["DRAM"]


SGD_BYTES = {"bf16": 18, "fp32": 20}


@pytest.mark.parametrize(("name", "dtype", "target"), [("paper/parameters/sgd/step", d, "traffic") for d in SGD_BYTES])
def test_sgd_traffic(name, dtype, target, answers):
    [launch] = answers[name, dtype, target]
    assert SGD_BYTES[dtype] <= launch["read"] + launch["written"] <= 1.002 * SGD_BYTES[dtype]


# ---- convolutions

# Matrix instruction and KB of shared memory
MATRIX = {
    "sm_80": ("HMMA", 163),
    "sm_86": ("HMMA", 99),
    "sm_89": ("HMMA", 99),
    "sm_90": ("HGMMA", 227),
    "sm_100": ("UTCHMMA", 227),
    "sm_120": ("HMMA", 99),
    "gfx942": ("v_mfma", 64),
}
# Instructions of the main loop per matrix instruction of the design
MAIN_LOOP = {
    ("paper/conv2/conv_relu/batch_tiled", "fp16", "sm_80"): 2.7,
    ("paper/conv3/conv_relu/batch_tiled", "fp16", "sm_80"): 2.9,
    ("paper/conv4/conv_relu/batch_tiled", "fp16", "sm_80"): 2.3,
    ("paper/conv3/conv_relu/batch_tiled", "fp32", "sm_80"): 1.15,
    ("paper/conv3/conv_relu/batch_tiled", "tf32", "sm_80"): 2.6,
    ("paper/conv5/conv_relu/descriptors", "fp16", "sm_90"): 14.5,
    ("paper/conv4/conv_relu/descriptors", "fp16", "sm_90"): 11.2,
    ("paper/conv4/conv_relu/descriptors", "tf32", "sm_90"): 18,
    ("paper/conv5/conv_relu/descriptors", "fp16", "sm_100"): 8.2,
    ("paper/conv5/conv_relu/descriptors", "bf16", "sm_100"): 8.2,
    ("paper/conv3/conv_relu/descriptors", "fp16", "sm_100"): 7.2,
    ("paper/conv3/conv_relu/descriptors", "fp16", "sm_120"): 2.5,
    ("paper/conv1_space_to_depth/conv_relu/batch_tiled", "fp16", "sm_80"): 2.5,
    ("paper/conv2/conv_relu/spatial", "fp16", "sm_80"): 3.1,
    ("paper/conv3/conv_relu/split_k", "fp16", "sm_90"): 31,
}
ALL_CONVOLUTIONS = [
    (name.removesuffix(f"/{kind}/channels_last"), kind, target)
    for name, entry in catalog.ENTRIES.items()
    if entry.operation == "conv_relu"
    for kind in ["tf32" if entry.precision == "tf32" else entry.dtype]
    for target in MATRIX
    # descriptors came with sm_90; sm_86 and sm_89 differ from sm_80 in their shared memory
    if not (entry.algorithm == "descriptors" and target in ("sm_80", "sm_86", "sm_89", "gfx942"))
    and not (kind != "fp16" and target in ("sm_86", "sm_89", "gfx942"))
]


def check_what_every_target_needs(launches, dtype, target, spilt=0):
    """Matrix instructions of the target, memory that it has, no trap, and at most so many values spilt."""
    matrix, kilobytes = MATRIX[target]
    for code in launches:
        assert code["spills"] <= spilt
        # the argument of a call that `compiler.is_spill` knows
        called = 8 if code["tiles"] and target == "sm_120" and TRITON < (3, 7) else 0
        assert code["stack"] <= called or spilt
        assert code["shared"] <= kilobytes * 1024
        assert code["tensor_memory"] <= 512
        assert not code["trap"]
    products = launches[0]["products"]
    assert products
    assert all(opcode.startswith("FFMA" if dtype == "fp32" else matrix) for opcode in products)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        pytest.param(*case, marks=() if case in MAIN_LOOP else pytest.mark.slow)
        for case in dict.fromkeys([*MAIN_LOOP, *ALL_CONVOLUTIONS])
    ],
)
def test_convolutions(name, dtype, target, answers):
    """Matrix instructions of the target, whole copies, memory that the target has, nothing spilt."""
    launches = answers[name, dtype, target]
    assert "error" not in launches
    entry = catalog.ENTRIES[f"{name}/{dtype}/channels_last"]
    # conv1's three channels are masked; `space_to_depth` makes them 48 before any algorithm sees them
    spilt = 8 if entry.channels == 3 and dtype == "fp32" and (TRITON < (3, 7) or target == "sm_120") else 0
    check_what_every_target_needs(launches, dtype, target, spilt)
    code = launches[0]
    assert ("TF32" in str(code["products"])) == (dtype == "tf32" and target != "sm_100")
    if target == "gfx942":
        return
    if entry.algorithm == "descriptors":
        assert code["tiles"]
        assert not code["copies"]
    elif entry.channels > 3:
        # of the bias: two columns or more at once
        assert min(map(int, code["loads"]), default=4) >= 4
        # the second tile of 96 = 64 + 32 features at a depth of 16 = 48 - 32 channels has 4 elements per thread
        narrowest = 8 if entry.channels == 48 else 16
        assert min(map(int, code["copies"])) >= narrowest
    assert "8" in launches[-1]["stores"] or "16" in launches[-1]["stores"] or entry.algorithm == "descriptors"
    # 3.6's loops are as long or longer on sm_90 and sm_100, and shorter on sm_80
    if (name, dtype, target) in MAIN_LOOP and TRITON >= (3, 8):
        instructions, number = code["main_loop"]
        assert instructions / number <= MAIN_LOOP[name, dtype, target]


# As MAIN_LOOP; the fast tier compiles conv3's in fp16
GRADIENT_LOOP = {
    ("paper/conv2/conv_backward/input_grad", "fp16", "sm_80"): 3.3,
    ("paper/conv3/conv_backward/input_grad", "fp16", "sm_80"): 2.9,
    ("paper/conv3/conv_backward/input_grad", "fp32", "sm_80"): 1.19,
    ("paper/conv3/conv_backward/input_grad", "tf32", "sm_80"): 2.6,
    ("paper/conv4/conv_backward/input_grad", "fp16", "sm_86"): 2.8,
    ("paper/conv3/conv_backward/input_grad_descriptors", "fp16", "sm_90"): 14.3,
    ("paper/conv4/conv_backward/input_grad_descriptors", "fp16", "sm_90"): 11.4,
    ("paper/conv3/conv_backward/input_grad_descriptors", "fp16", "sm_100"): 8.2,
    ("paper/conv4/conv_backward/input_grad_descriptors", "fp16", "sm_100"): 7.2,
    ("paper/conv3/conv_backward/weight_grad", "fp16", "sm_80"): 3.2,
    ("paper/conv3/conv_backward/weight_grad", "fp32", "sm_80"): 1.2,
    ("paper/conv3/conv_backward/weight_grad_descriptors", "fp16", "sm_90"): 28.4,
    ("paper/conv3/conv_backward/weight_grad_descriptors", "tf32", "sm_90"): 36,
    ("paper/conv3/conv_backward/weight_grad_descriptors", "fp16", "sm_100"): 12.9,
    ("paper/conv3/conv_backward/weight_grad_descriptors", "fp16", "sm_120"): 2.6,
}
# ptxas stops at 128 registers or 96 there, and moves values that the loop does not need
SPILT_GRADIENTS = {("paper/conv2/conv_backward/input_grad", "tf32", "sm_80"): 3}
if TRITON < (3, 7):
    SPILT_GRADIENTS |= {
        ("paper/conv2/conv_backward/input_grad_descriptors", "tf32", "sm_120"): 6,
        ("paper/conv2/conv_backward/weight_grad_descriptors", "fp16", "sm_120"): 9,
        ("paper/conv1_space_to_depth/conv_backward/weight_grad_descriptors", "fp16", "sm_120"): 10,
    }
ALL_GRADIENTS = [
    (name.removesuffix(f"/{kind}/channels_last"), kind, target)
    for name, entry in catalog.ENTRIES.items()
    if entry.operation == "conv_backward"
    for kind in ["tf32" if entry.precision == "tf32" else entry.dtype]
    for target in MATRIX
    if not (entry.algorithm.endswith("descriptors") and target in ("sm_80", "sm_86", "sm_89", "gfx942"))
    and not (kind != "fp16" and target in ("sm_86", "sm_89", "gfx942"))
    # bf16 differs from fp16 in the type of an instruction
    and not (kind == "bf16" and target in ("sm_80", "sm_120"))
]


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        pytest.param(
            *case, marks=() if case in GRADIENT_LOOP and "conv3" in case[0] and case[1] == "fp16" else pytest.mark.slow
        )
        for case in dict.fromkeys([*GRADIENT_LOOP, *ALL_GRADIENTS])
    ],
)
def test_gradients(name, dtype, target, answers):
    """As the forward: matrix instructions, whole copies, memory that the target has, nothing spilt."""
    launches = answers[name, dtype, target]
    assert "error" not in launches
    entry = catalog.ENTRIES[f"{name}/{dtype}/channels_last"]
    spilt = SPILT_GRADIENTS.get((name, dtype, target), 0)
    check_what_every_target_needs(launches, dtype, target, spilt)
    code = launches[0]
    if target == "gfx942":
        return
    if entry.algorithm.endswith("descriptors"):
        assert code["tiles"]
        assert not code["copies"]
    elif not (entry.grad == "weight_grad" and dtype == "tf32" and target in ("sm_90", "sm_100")):
        # these take tf32 operands along the sum only, which a weight gradient's are not: copies of one element
        # the second tile of 48 = 32 + 16 channels has 2 elements per thread there
        narrowest = 8 if (dtype, target) == ("fp32", "sm_120") and "conv3" not in name else 16
        assert min(map(int, code["copies"])) >= narrowest
        assert min(map(int, code["loads"]), default=16) == 16
    assert "16" in launches[-1]["stores"] or entry.grad == "input_grad"
    if (name, dtype, target) in GRADIENT_LOOP and TRITON >= (3, 8):
        instructions, number = code["main_loop"]
        assert instructions / number <= GRADIENT_LOOP[name, dtype, target]


# ---- the baseline: `make kernel-table`

BASELINE = machine_code.load(Path(__file__).with_name("baseline.json"))
COMPILED_ANYWAY = {case for case in CASES if not is_slow(*case)} | set(MAIN_LOOP)


def baseline_cases():
    """(name, dtype, target) of every entry; in the fast tier those that are compiled above or in less than a second."""
    for entry, target in dict.fromkeys((row["entry"], row["target"]) for row in BASELINE["rows"]):
        *name, dtype, layout = entry.split("/")
        assert layout == "channels_last"
        case = ("/".join(name), dtype, target)
        quick = dtype == "fp16" and name[2] in ("bias_relu", "relu_bias_grad", "lrn")
        yield pytest.param(*case, marks=() if quick or case in COMPILED_ANYWAY else pytest.mark.slow)


@pytest.mark.parametrize(("name", "dtype", "target"), list(baseline_cases()))
def test_no_worse_than_the_baseline(name, dtype, target, answers):
    """Nothing is spilt, and with the same Triton at most 5 % more instructions are issued."""
    entry = f"{name}/{dtype}/channels_last"
    launches = answers[name, dtype, target]
    assert "error" not in launches
    assert all(code["spills"] == code["stack"] == 0 for code in launches)
    if BASELINE["triton"] == triton.__version__:
        old = [row for row in BASELINE["rows"] if (row["entry"], row["target"]) == (entry, target)]
        assert machine_code.regressions(old, [{"entry": entry, "target": target, **code} for code in launches]) == []


@pytest.mark.skipif(not interpreting(), reason="launchers ask the device for its memory")
def test_the_baseline_has_every_launch():
    """A row for each launch that `make kernel-table` compiles, and no other."""
    asked = inspect.signature(cli.inspect).parameters
    expected = Counter(
        (name, target, launch.name)
        for name in machine_code.names(asked["dtype"].default)
        for target in asked["target"].default
        for launch in catalog.launches(catalog.ENTRIES[name])
        if launch.name != "sum_partials_kernel"
    )
    assert not any("error" in row for row in BASELINE["rows"])
    found = Counter((row["entry"], row["target"], row["kernel"]) for row in BASELINE["rows"])
    differences = [*(("missing", *row) for row in expected - found), *(("stale", *row) for row in found - expected)]
    assert not differences, "tests/kernels/baseline.json is not of today's catalogue; `make kernel-table` renews it"


def test_every_operation_is_in_the_baseline():
    """One layer's, at least; `catalog.representative` and `machine_code.names` choose."""
    passes = {tuple(name.split("/")[2:4]) for name in catalog.ENTRIES}
    compared = {tuple(row["entry"].split("/")[2:4]) for row in BASELINE["rows"]}
    assert {(operation, way) for operation, way in passes if way != "inference"} == compared


def test_the_document_shows_the_baseline():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    for table in (machine_code.code_table(BASELINE["rows"]), machine_code.chip_table()):
        assert machine_code.markdown(table) in text, "docs/kernels.md differs; `make kernel-table` renews both"


# ---- the tools

LISTING = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0040*/                   STL [R1], R8 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
        /*0080*/                   NOP ;
"""


def test_instructions_are_weighted_by_their_loop():
    code = compiler.instructions(LISTING)
    assert [opcode for _, opcode, *_ in code][:3] == ["IMAD.MOV.U32", "LDG.E.128", "BRA"]
    assert len(code) == 8
    # the move, the exit and the trap once; load and two branches three times; the rare case never
    assert compiler.issued(code, 3) == {"IMAD.MOV.U32": 1, "LDG.E.128": 3, "BRA": 3 + 3 + 1, "EXIT": 1}
    assert compiler.issued(code, None) is None


def test_spills():
    """Values that come and go, and not the zero on the stack for a call."""
    lines = {"LDL.64 R2, [R1]": True, "STL [R1+0x8], R9": True, "STL.64 [R1], RZ   &rd=0x2 ?trans1": False}
    assert {text: compiler.is_spill(text.split()[0], text) for text in lines} == lines
    assert not compiler.is_spill("STG.E", "STG.E desc[UR4][R2.64], R5")


def test_pipes():
    opcodes = {
        "FFMA": "fma", "HADD2.F32": "fma", "IMAD.MOV.U32": "fma", "MUFU.RSQ": "xu", "F2FP.F16.F32.PACK_AB": "alu",
        "LOP3.LUT": "alu", "LDG.E.128": "lsu", "HGMMA.64x64x16.F32": "tensor", "UTCHMMA": "tensor", "UIADD3": "uniform",
        "BRA": "control",
    }  # fmt: skip
    assert {opcode: compiler.pipe(opcode) for opcode in opcodes} == opcodes


def test_the_main_loop():
    code = compiler.instructions(LISTING)
    assert compiler.main_loop(code, {"LDG.E.128"}) == (5, 1)
    assert compiler.main_loop(code, {"EXIT"}) is None


def test_access_bytes():
    widths = {"LDG.E": 4, "LDG.E.128": 16, "LDG.E.64.CONSTANT": 8, "LDG.E.U16": 2, "STG.E.U8": 1, "LDG.E.S8": 1}
    assert {opcode: compiler.access_bytes(opcode) for opcode in widths} == widths


@pytest.mark.skipif(not interpreting(), reason="counts in the interpreter")
def test_traffic_counts_sectors():
    z = torch.zeros(3, 16, dtype=torch.float16)
    with traffic.counting() as counted:
        bias_relu_(z)
        bias_relu_(z, torch.zeros(16, dtype=torch.float16))
    assert counted == [("bias_relu_kernel", 96, 96), ("bias_relu_kernel", 128, 96)]


def test_a_crash_costs_its_own_entry(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    worker = """
import json, os, sys
for line in sys.stdin:
    if json.loads(line)[0] == "bad":
        os._exit(3)
    print("[]", flush=True)
"""
    monkeypatch.setattr(compiler, "WORKER", worker)
    requests = [(name, "sm_90") for name in ("good", "bad", "better")]
    done = []
    found = compiler.results(requests, processes=1, done=lambda: done.append(1))
    assert len(done) == 3
    assert found["good", "sm_90"] == found["better", "sm_90"] == []
    assert "ended with code 3" in found["bad", "sm_90"]["error"]

    # what worked comes from the cache from now on
    monkeypatch.setattr(compiler, "WORKER", "raise SystemExit(4)")
    assert compiler.results(requests[:1]) == {("good", "sm_90"): []}
    assert "code 4" in compiler.results(requests[1:2])["bad", "sm_90"]["error"]


def test_ctrl_c_begins_nothing_more(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "WORKER", "import sys\nfor line in sys.stdin:\n    print('[]', flush=True)")
    done = []

    def interrupt():
        done.append(1)
        if len(done) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        compiler.results([(f"entry {i}", "sm_90") for i in range(100)], processes=1, done=interrupt)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert len(done) == 1


def test_results_are_kept_while_what_they_depend_on_stays():
    name = "paper/conv5/max_pool/backward/fp16/channels_last"
    text = compiler.sources(name, "sm_90")
    for part in ("def max_pool_bwd(", "def one_hot(", "def sum_partials_kernel(", "def measured_cubin(", "direction="):
        assert part in text
    assert "def lrn_max_pool_bwd(" not in text
    assert "def lrn_max_pool_bwd(" in compiler.sources("paper/conv2/lrn_max_pool/backward/fp16/channels_last", "sm_90")
    assert "class Sectors" not in text
    assert "class Sectors" in compiler.sources(name, "traffic")


def test_unknown_entries_are_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = compiler.results([("paper/conv9", "sm_90")])
    assert "KeyError" in found["paper/conv9", "sm_90"]["error"]

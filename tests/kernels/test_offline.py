"""The catalogue is what the models launch, and its kernels compile to the code that they were designed for."""

from collections import Counter

import pytest
import torch
import triton

from fastalex import backend
from fastalex.alexnet import VARIANTS, AlexNet
from fastalex.kernels import catalog, offline, traffic
from fastalex.kernels.bias_relu import bias_relu_
from fastalex.kernels.registers import interpreting

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
        if (entry.variant, entry.dtype, entry.layout) == (variant, "fp32", "channels_last") and wanted(entry)
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
        same = entry.direction == "forward" and entry.operation in ("bias_relu", "lrn") and not entry.dropout
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
    "paper/conv1/lrn_max_pool/forward": (16.2, 2.72),
    # 13 output rows in two blocks of 7
    "paper/conv2/lrn_max_pool/forward": (17.7 * 14 / 13, 2.72),
    "paper/conv1/lrn_max_pool/backward": (30.5, 4.72),
    "paper/conv2/lrn_max_pool/backward": (30.5, 4.72),
    "paper/conv5/max_pool/forward": (6.7, 2.72),
    # 13 rows and columns in 7 pairs, 7 pairs in 8 lanes
    "paper/conv5/max_pool/backward": (11.4 * (14 / 13) ** 2 * 8 / 7, 2.72),
}
CASES = [
    *((name, dtype, "sm_90") for name in DESIGN for dtype in catalog.DTYPES),
    *((name, "fp16", target) for name in DESIGN for target in offline.TARGETS if target != "sm_90"),
]


def is_slow(name, dtype, target):
    # the fused forwards take 17 to 40 seconds each to compile: one of them for one target in the fast tier
    if "lrn_max_pool/forward" in name:
        return (name, dtype, target) != ("paper/conv1/lrn_max_pool/forward", "fp16", "sm_90")
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
    found = offline.results([request_of(*case) for case in selected])
    return {case: found[request_of(*case)] for case in selected}


@pytest.mark.parametrize(("name", "dtype", "target"), marked(CASES))
def test_machine_code(name, dtype, target, answers):
    launches = answers[name, dtype, target]
    assert "error" not in launches
    code = launches[0]
    assert code["spills"] == code["stack"] == 0
    if target == "gfx942":
        # max-pool is cut for 32 lanes: half a vector per thread and 128 bytes of shared memory with 64
        assert code["shared"] <= 128
        assert {"16", "8"} & set(code["loads"])
        return
    # before 3.7, Triton exchanged values between lanes through shared memory, as these kernels' backward passes do
    exchanges = "lrn" in name and "backward" in name and TRITON < (3, 7)
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
    code = offline.instructions(LISTING)
    assert [opcode for _, opcode, *_ in code][:3] == ["IMAD.MOV.U32", "LDG.E.128", "BRA"]
    assert len(code) == 8
    # the move, the exit and the trap once; load and two branches three times; the rare case never
    assert offline.issued(code, 3) == {"IMAD.MOV.U32": 1, "LDG.E.128": 3, "BRA": 3 + 3 + 1, "EXIT": 1}
    assert offline.issued(code, None) is None


def test_pipes():
    opcodes = {
        "FFMA": "fma", "HADD2.F32": "fma", "IMAD.MOV.U32": "fma", "MUFU.RSQ": "xu", "F2FP.F16.F32.PACK_AB": "alu",
        "LOP3.LUT": "alu", "LDG.E.128": "lsu", "HGMMA.64x64x16.F32": "tensor", "UTCHMMA": "tensor", "UIADD3": "uniform",
        "BRA": "control",
    }  # fmt: skip
    assert {opcode: offline.pipe(opcode) for opcode in opcodes} == opcodes


def test_access_bytes():
    widths = {"LDG.E": 4, "LDG.E.128": 16, "LDG.E.64.CONSTANT": 8, "LDG.E.U16": 2, "STG.E.U8": 1, "LDG.E.S8": 1}
    assert {opcode: offline.access_bytes(opcode) for opcode in widths} == widths


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
    monkeypatch.setattr(offline, "WORKER", worker)
    requests = [(name, "sm_90") for name in ("good", "bad", "better")]
    found = offline.results(requests, processes=1)
    assert found["good", "sm_90"] == found["better", "sm_90"] == []
    assert "ended with code 3" in found["bad", "sm_90"]["error"]

    # what worked comes from the cache from now on
    monkeypatch.setattr(offline, "WORKER", "raise SystemExit(4)")
    assert offline.results(requests[:1]) == {("good", "sm_90"): []}
    assert "code 4" in offline.results(requests[1:2])["bad", "sm_90"]["error"]


def test_unknown_entries_are_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = offline.results([("paper/conv9", "sm_90")])
    assert "KeyError" in found["paper/conv9", "sm_90"]["error"]

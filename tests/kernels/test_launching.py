"""Every launch of the catalogue passes Triton's launcher and the rules of an H100: grids, memory, TMA descriptors."""

import ctypes
import os
import shutil
import subprocess
import sys

import launching
import pytest

from fastalex.inspection import catalog

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to build a libcuda with")

REPRESENTATIVE = {entry.name for entry in catalog.representative("fp16")}
IN_SECONDS = {
    *(name for name in REPRESENTATIVE if not ("conv2" in name and "lrn_max_pool/forward" in name)),
    *(f"paper/conv3/conv_relu/{algorithm}/fp16/channels_last" for algorithm in ("batch_tiled", "descriptors")),
    *(f"paper/conv3/conv_backward/{grad}_descriptors/fp16/channels_last" for grad in ("input_grad", "weight_grad")),
}
# One of each bucket that a measurement holds for: a convolution's tiles depend on the batch.
BATCHES = (1, 32, 128, 256)


def cases():
    """(entry, batch); bvlc_alexnet's fused forwards, minutes to compile, are paper's with other numbers."""
    for name, entry in catalog.ENTRIES.items():
        if name.startswith("bvlc_alexnet") and entry.operation == "lrn_max_pool" and entry.direction != "backward":
            continue
        batches = {entry.batch, *BATCHES} if isinstance(entry, catalog.ConvEntry) else {entry.batch}
        for batch in sorted(batches):
            quick = name in IN_SECONDS and batch == entry.batch
            yield pytest.param(name, batch, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def answers(request):
    """What became of all launches of this file that were selected."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    params = [item.callspec.params for item in items if "batch" in item.callspec.params]
    return launching.launched([(param["name"], param["batch"]) for param in params])


@pytest.mark.parametrize(("name", "batch"), list(cases()))
def test_launches(name, batch, answers):
    found = answers[f"{name} {batch}"]
    assert "error" not in found
    assert found["launched"] == found["recorded"] > 0
    assert (found["descriptors"] > 0) == ("descriptors" in name)


# ---- the rules themselves


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    # under another name: what asks for CUDA in this process must not find it
    return launching.build(tmp_path_factory.mktemp("rules"), "rules.so")


def refusal(library, result):
    text = ctypes.c_char_p()
    library.cuGetErrorString(result, ctypes.byref(text))
    return text.value.decode() if result else None


DESCRIPTOR = {"address": 4096, "sizes": (64, 100), "stride": 128, "box": (64, 128), "step": 1, "swizzle": 3}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"swizzle": 0}, None),
        ({"address": 4104}, "not a multiple of 16"),
        ({"sizes": (64, 0)}, "a tensor of 0 in dimension 1"),
        ({"sizes": (2**32 + 1, 100)}, "a tensor of 4294967297 in dimension 0"),
        ({"stride": 136}, "stride of 136 bytes"),
        ({"stride": 2**40}, "stride of"),
        ({"box": (64, 257)}, "box of 257 in dimension 1"),
        ({"box": (0, 128)}, "box of 0 in dimension 0"),
        ({"box": (4, 128)}, "box of 8 bytes"),
        ({"box": (72, 128)}, "box of 144 bytes in a span of 128"),
        ({"swizzle": 1}, "box of 128 bytes in a span of 32"),
        ({"step": 9}, "step of 9"),
    ],
)
def test_rules_of_descriptors(changes, reason, library):
    case = DESCRIPTOR | changes
    fp16 = 6
    memory = ctypes.create_string_buffer(128 + 64)
    result = library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(-(-ctypes.addressof(memory) // 64) * 64),
        fp16,
        2,
        ctypes.c_void_p(case["address"]),
        (ctypes.c_uint64 * 2)(*case["sizes"]),
        (ctypes.c_uint64 * 1)(case["stride"]),
        (ctypes.c_uint32 * 2)(*case["box"]),
        (ctypes.c_uint32 * 2)(1, case["step"]),
        0,
        case["swizzle"],
        0,
        0,
    )
    found = refusal(library, result)
    assert found is None if reason is None else reason in found


ILLEGAL = """
import sys
import launching
launching.install(sys.argv[1])
from fastalex.inspection import catalog
[one] = catalog.launches(catalog.ENTRIES["caffenet/conv1/lrn/forward/fp16/channels_last"])
for grid in (one.grid, (1, 65536), (1, 1, 65536)):
    try:
        one.kernel[grid](*one.args, **one.constants)
        print("launched")
    except RuntimeError as error:
        print(error)
"""


def test_rules_of_launches_reach_the_caller(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ILLEGAL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("Triton Error [CUDA]: ") for line in done.stdout.splitlines()]
    assert told == ["launched", "a grid of 1 x 65536 x 1", "a grid of 1 x 1 x 65536"]

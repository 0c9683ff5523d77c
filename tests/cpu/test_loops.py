"""fastalex.cpu.loops beyond what every test of this folder says about it: threads, rounding, and doing without."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalex import cpu
from fastalex.cpu.lrn import lrn_bwd, lrn_fwd
from fastalex.cpu.lrn_max_pool import lrn_max_pool_bwd, lrn_max_pool_fwd
from fastalex.cpu.max_pool import max_pool_bwd, max_pool_fwd

numba = pytest.importorskip("numba")
from fastalex.cpu import loops  # noqa: E402

ROOT = Path(__file__).parents[2]
NORM = 5, 0.5, 0.75, 2.0
GEOMETRY = (3, 3), (2, 2), (1, 1), (1, 1)


@pytest.fixture(autouse=True)
def kernels():
    """Here the folder's two kinds of kernels would be one."""


def results(dtype, layout):
    torch.manual_seed(0)
    x, grad, pooled_grad, padded_grad = (
        torch.randn(3, 24, *size).to(dtype).to(memory_format=layout) for size in ((15, 13), (15, 13), (7, 6), (8, 7))
    )
    pooled, pool_codes = max_pool_fwd(x, *GEOMETRY, False)
    found = (
        lrn_fwd(x, *NORM),
        lrn_bwd(grad, x, *NORM),
        pooled,
        pool_codes,
        max_pool_bwd(padded_grad, pool_codes, x.shape[2:], *GEOMETRY),
    )
    if layout == torch.channels_last:
        y, codes = lrn_max_pool_fwd(x, *NORM)
        found += y, codes, lrn_max_pool_bwd(pooled_grad, codes, x, *NORM)
    return found


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype, layout, monkeypatch):
    alone = results(dtype, layout)
    monkeypatch.setattr(loops, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ranges = []
    pool = loops._pool
    monkeypatch.setattr(loops, "_pool", lambda *args: (ranges.append(args), pool(*args))[1])
    together = results(dtype, layout)
    assert len(ranges) == 2 * (6 if layout == torch.channels_last else 4)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    x = torch.randn(3, 24, 15, 13).to(memory_format=torch.channels_last)
    monkeypatch.setattr(loops, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    y = lrn_fwd(x, *NORM)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(lrn_fwd(x, *NORM), y) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bfloat16_is_rounded_as_pytorch_rounds():
    values = torch.randn(4096) * 10.0 ** torch.randint(-45, 39, (4096,))
    largest = torch.finfo(torch.float32).max
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, 1 + 2**-8, 1 + 3 * 2**-8])
    values = torch.cat([values, special])
    rounded = torch.empty(len(values), dtype=torch.uint16)
    back = torch.empty(len(values))

    @numba.njit
    def convert(source, target, wide):
        loops.store(source, target)
        loops.load(target, wide)

    convert(values.numpy(), rounded.numpy(), back.numpy())
    expected = values.bfloat16()
    assert torch.equal(rounded.view(torch.bfloat16).float().nan_to_num(7), expected.float().nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), expected.float().nan_to_num(7))
    assert torch.equal(torch.signbit(back[:-9]), torch.signbit(expected[:-9]))


def test_no_kernel_is_made_of_another_file():
    """Of whose changes numba's cache on disk would not know."""
    imports = [
        node for node in ast.walk(ast.parse(Path(loops.__file__).read_text())) if "Import" in type(node).__name__
    ]
    assert imports
    assert not any("fastalex" in ast.unparse(node) for node in imports)


@pytest.fixture
def choice():
    """The choice of loops or formulas is made anew in the test, and again after it."""
    cpu.compiled_loops.cache_clear()
    yield
    cpu.compiled_loops.cache_clear()


def check_formulas(caplog, reason):
    x = torch.randn(2, 8, 5, 5)
    for _ in range(2):
        assert cpu.compiled_loops() is None
        torch.testing.assert_close(lrn_fwd(x, *NORM), torch.nn.functional.local_response_norm(x, *NORM))
    assert [record.getMessage() for record in caplog.records] == [
        f"LRN and pooling run as formulas in plain PyTorch, slowly: {reason}; "
        "pip install 'fastalex[cpu]' brings compiled loops"
    ]


@pytest.mark.parametrize(
    "error", [ImportError("Numba needs NumPy 2.4 or less"), RuntimeError("cannot cache function 'lrn_kernel'")]
)
def test_does_without_a_numba_that_cannot_be_imported(error, choice, monkeypatch, caplog):
    load = importlib.import_module

    def refuse(name, *package):
        if name == "fastalex.cpu.loops":
            raise error
        return load(name, *package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    check_formulas(caplog, error)


def test_does_without_a_numba_that_may_not_compile(choice, monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    check_formulas(caplog, "NUMBA_DISABLE_JIT is set")


def test_operators_without_numba():
    """The tests of the operators in a process that cannot import it."""
    tests = [f"tests/ops/test_{name}.py" for name in ("lrn", "max_pool", "lrn_max_pool")]
    script = """
import sys
sys.modules["numba"] = None
import pytest
from fastalex import cpu
failed = pytest.main(sys.argv[1:])
assert cpu.compiled_loops() is None
sys.exit(failed)
"""
    command = [sys.executable, "-c", script, *tests, "-k", "not triton", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

"""fastalex.cpu.compiled beyond what every test of this folder says about it: threads, rounding, and doing without."""

import importlib
import os

import pytest
import torch

from fastalex import cpu
from fastalex.cpu.lrn import lrn_bwd, lrn_fwd
from fastalex.cpu.lrn_max_pool import lrn_max_pool_bwd, lrn_max_pool_fwd
from fastalex.cpu.max_pool import max_pool_bwd, max_pool_fwd

numba = pytest.importorskip("numba")
from fastalex.cpu import compiled  # noqa: E402

NORM = 5, 0.5, 0.75, 2.0
GEOMETRY = (3, 3), (2, 2), (1, 1), (1, 1)


@pytest.fixture(autouse=True)
def kernels():
    """Here the folder's two kinds of kernels would be one."""


def results(x, grad, pooled_grad, padded_grad):
    y, codes = lrn_max_pool_fwd(x, *NORM)
    pooled, pool_codes = max_pool_fwd(x, *GEOMETRY, False)
    return (
        lrn_fwd(x, *NORM),
        lrn_bwd(grad, x, *NORM),
        y,
        codes,
        lrn_max_pool_bwd(pooled_grad, codes, x, *NORM),
        pooled,
        pool_codes,
        max_pool_bwd(padded_grad, pool_codes, x.shape[2:], *GEOMETRY),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype, monkeypatch):
    x, grad = (torch.randn(3, 24, 15, 13).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    pooled_grad = torch.randn(3, 24, 7, 6).to(dtype).to(memory_format=torch.channels_last)
    padded_grad = torch.randn(3, 24, 8, 7).to(dtype).to(memory_format=torch.channels_last)
    alone = results(x, grad, pooled_grad, padded_grad)
    monkeypatch.setattr(compiled, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    calls = []
    share = compiled._share
    monkeypatch.setattr(compiled, "_share", lambda *args: (calls.append(args[0]), share(*args)))
    together = results(x, grad, pooled_grad, padded_grad)
    assert len(calls) == 6
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    x = torch.randn(3, 24, 15, 13).to(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    monkeypatch.setattr(compiled, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    compiled.lrn_fwd(x, y, 5, 0.5, 2.0, 1)
    child = os.fork()
    if child == 0:
        again = torch.empty_like(x)
        compiled.lrn_fwd(x, again, 5, 0.5, 2.0, 1)
        os._exit(0 if torch.equal(again, y) else 1)
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
        compiled.store(source, target)
        compiled.load(target, wide)

    convert(values.numpy(), rounded.numpy(), back.numpy())
    expected = values.bfloat16()
    assert torch.equal(rounded.view(torch.bfloat16).float().nan_to_num(7), expected.float().nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), expected.float().nan_to_num(7))
    assert torch.equal(torch.signbit(back[:-9]), torch.signbit(expected[:-9]))


@pytest.mark.parametrize(
    "error", [ImportError("Numba needs NumPy 2.4 or less"), RuntimeError("cannot cache function 'lrn_kernel'")]
)
def test_does_without_a_numba_that_cannot_be_imported(error, monkeypatch, caplog):
    def refuse(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    cpu._compiled.cache_clear()
    try:
        x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
        for _ in range(2):
            assert cpu.compiled_for(x) is None
            lrn_fwd(x, *NORM)
        assert [record.message for record in caplog.records] == [f"the CPU kernels do without numba: {error}"]
    finally:
        cpu._compiled.cache_clear()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 5, 5),
        torch.randn(2, 8, 5, 5).half().to(memory_format=torch.channels_last),
        torch.randn(2, 8, 5, 5).double().to(memory_format=torch.channels_last),
        torch.randn(0, 8, 5, 5).to(memory_format=torch.channels_last),
    ],
)
def test_leaves_the_rest_to_pytorch(x):
    assert cpu.compiled_for(x) is None
    one = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert cpu.compiled_for(one) is compiled
    assert cpu.compiled_for(one, one.double()) is None

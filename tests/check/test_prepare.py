"""Kernels compiled without a GPU into a cache that is found again."""

import pytest

from fastalex.check.prepare import BATCHES, entries, prepare
from fastalex.inspection import catalog

CHEAP = "paper/fc6/relu_bias_grad/backward/fp16/channels_last"


def test_what_is_compiled_once_is_found_again(tmp_path, monkeypatch, capsys):
    for name in ("TRITON_CACHE_DIR", "TRITON_INTERPRET", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back afterwards
    assert prepare(tmp_path / "cache", "sm_90", [CHEAP], [1, 128]) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert not first.startswith("0 kernels compiled for sm_90")
    assert prepare(tmp_path / "cache", "sm_90", [CHEAP], [1, 128]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 kernels compiled for sm_90, ")


def test_an_entry_that_does_not_compile_is_told(tmp_path, monkeypatch, capsys):
    for name in ("TRITON_CACHE_DIR", "TRITON_INTERPRET", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    assert prepare(tmp_path / "cache", "sm_90", [CHEAP], [-1]) == 1
    assert CHEAP in capsys.readouterr().out


def test_the_catalogue_is_there():
    names = entries()
    assert "lrn_max_pool" in names[0]
    assert {catalog.ENTRIES[name].operation for name in names} >= {"lrn", "max_pool", "conv_relu", "conv_backward"}
    assert 1024 in BATCHES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--minutes", "0"], "--minutes must be above 0, got 0.0"), (["--device", "cuda"], "finds no CUDA device here")],
)
def test_arguments_that_make_no_sense(arguments, message, capsys, monkeypatch, tmp_path):
    import torch

    from fastalex.check.command import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err

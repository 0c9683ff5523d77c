"""Memory that a launcher allocates starts as NaN or integer garbage: an element that no kernel writes shows."""

import functools

import pytest
import torch

# 0x5A in every byte: positive, out of range as an index, and no window code of a small window
GARBAGE = {
    torch.uint8: 0x5A,
    torch.int8: 0x5A,
    torch.int16: 0x5A5A,
    torch.int32: 0x5A5A5A5A,
    torch.int64: 0x5A5A5A5A5A5A5A5A,
}


def poisoned(allocate):
    """The same allocation, filled with NaN (floating dtypes), 0x5A bytes (integers) or True (bool)."""

    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.is_floating_point():
            out.detach().fill_(torch.nan)
        else:
            out.fill_(GARBAGE.get(out.dtype, 1))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """torch.empty, its _like, _strided and _permuted forms and Tensor.new_empty return poisoned memory."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))

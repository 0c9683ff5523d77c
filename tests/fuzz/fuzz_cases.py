"""Tensors as nobody would write them down: memory in any order, values of every kind, sizes down to nothing."""

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FACTOR = {"fast": 1, "once": 1, "long": 20}


def examples(count: int) -> Callable:
    """hypothesis' settings with this many examples in the fast profile."""
    profile = os.environ.get("FASTALEX_FUZZ", "fast")
    return settings(settings.get_profile(profile), max_examples=count * FACTOR[profile])


def packed(values: Tensor) -> Tensor:
    return values


def channels_last(values: Tensor) -> Tensor:
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 2 else values


def off_by(values: Tensor) -> Tensor:
    """Packed, but not where an allocation starts."""
    return torch.cat([values.new_zeros(3), values.flatten()])[3:].view(values.shape)


def every_second(values: Tensor) -> Tensor:
    """A view on a larger tensor, with garbage in between and behind it."""
    if values.dim() == 0:
        return values
    larger = torch.full([2 * size + 1 for size in values.shape], 77.0).to(values.dtype)
    view = larger[tuple(slice(0, 2 * size, 2) for size in values.shape)]
    view.copy_(values)
    return view


def last_column(values: Tensor) -> Tensor:
    larger = torch.full((*values.shape, 3), 77.0).to(values.dtype)
    larger[..., 2] = values
    return larger[..., 2]


def backwards(values: Tensor) -> Tensor:
    """All dimensions in the opposite order in memory."""
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def repeated(values: Tensor) -> Tensor:
    """The first of each dimension, expanded: strides of 0."""
    if 0 in values.shape:
        return values
    return values[tuple(slice(0, 1) for _ in values.shape)].expand(values.shape)


def first_repeated(values: Tensor) -> Tensor:
    return values[:1].expand(values.shape) if values.dim() and len(values) else values


LAYOUTS = [packed, packed, channels_last, channels_last, off_by]
LAYOUTS += [every_second, last_column, backwards, repeated, first_repeated]
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31)
sometimes_special = st.sampled_from([(), (), (), (torch.nan,), (torch.inf,), (-torch.inf,), (torch.nan, torch.inf)])


@dataclass(frozen=True)
class Values:
    """Small integers, whose sums every dtype holds exactly: ties are many, and nothing is left to rounding."""

    seed: int
    layout: Callable[[Tensor], Tensor] = packed
    special: tuple[float, ...] = ()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, largest: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)
        for value in self.special:
            if values.numel():
                place = torch.randint(values.numel(), (1 + values.numel() // 40,), generator=generator)
                values.view(-1)[place] = value
        return self.layout(values)


def values(special: bool = True) -> st.SearchStrategy[Values]:
    return st.builds(Values, seeds, layouts, sometimes_special if special else st.just(()))


def in_form(pair: tuple[int, int], form: int):
    """The same two numbers as torch takes them."""
    forms = [pair, list(pair), tuple(np.int64(n) for n in pair)]
    if pair[0] == pair[1]:
        forms += [pair[0], [pair[0]], np.int32(pair[0]), torch.Size(pair)]
    return forms[form % len(forms)]


def forked(function: Callable[[], None]) -> None:
    """Runs the function in a child, so that a crash there is a failure here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = b""
        try:
            function()
        except BaseException:
            message = pickle.dumps(traceback.format_exc())
        os.write(writer, message[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        message = file.read()
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), f"the child died of signal {os.WTERMSIG(status)}"
    assert not message, pickle.loads(message)


def assert_same(got: Tensor, expected: Tensor, rounding: float = 0.0, what: str = "", floor: float = 0.0) -> None:
    """Equal, NaN and infinities at the same places; `rounding` in parts of the largest value, `floor` at least."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    wide, wanted = got.detach().double(), expected.detach().double()
    assert torch.equal(wide.isnan(), wanted.isnan()), f"{what}: NaN at other places"
    finite = wanted.isfinite()
    assert torch.equal(wide[~finite].nan_to_num(), wanted[~finite].nan_to_num()), f"{what}: infinities elsewhere"
    if finite.any():
        error = (wide - wanted)[finite].abs().max()
        largest = max(floor, wanted[finite].abs().max().item())
        assert error <= rounding * largest, f"{what}: off by {error:.3g} of {largest:.3g}"

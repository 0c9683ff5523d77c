"""Sums of partial sums: any number of rows and columns, bias, ReLU, dtypes, and how long their chains are."""

import pytest
import torch
from tolerances import assert_matches

from fastalex.inspection import catalog
from fastalex.kernels import partial_sums
from fastalex.kernels.partial_sums import sum_partials
from fastalex.kernels.registers import interpreting


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (1, 96), (300, 20), (128, 8), (1000, 3)])
def test_sum_partials(count, channels):
    partials = torch.randn(count, channels)
    wide = partials.double()
    assert_matches(sum_partials(partials), wide.sum(0), terms=count, magnitude=wide.abs().sum(0))
    assert torch.equal(sum_partials(partials), sum_partials(partials))


def test_sum_of_no_partials_is_zero():
    assert torch.equal(sum_partials(torch.zeros(0, 12)), torch.zeros(12))
    assert sum_partials(torch.zeros(3, 0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("count", "length", "features"),
    [(2, 96, 48), (5, 4097, 4097), (33, 64, 8), (1025, 32, 32), (9, 16384, 64)],
)
def test_bias_and_relu(count, length, features, dtype):
    """The parts of a convolution's sum: the bias, as often as it fits, and the ReLU behind the last addition only."""
    partials, bias = torch.randn(count, length), torch.randn(features).to(dtype)
    columns = bias.double().repeat(length // features)
    total = partials.double().sum(0) + columns
    magnitude = partials.double().abs().sum(0) + columns.abs()
    # the interpreter truncates to bf16 where hardware rounds
    options = {"truncates": dtype is torch.bfloat16 and interpreting()}
    for relu in (False, True):
        found = sum_partials(partials, bias, relu=relu, dtype=dtype)
        assert found.dtype == dtype
        assert_matches(found, total.clamp_min(0) if relu else total, terms=count + 1, magnitude=magnitude, **options)


@pytest.mark.parametrize("count", [2, 300, 1025])
def test_nan_passes_the_relu(count):
    partials = torch.randn(count, 40)
    partials[count // 2, 7] = torch.nan
    found = sum_partials(partials, torch.zeros(8), relu=True)
    assert found.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("batch", [1, 32, 128, 1024, 4096])
def test_sums_of_partials_are_chains_of_at_most_eight_loads(batch):
    """In every layer of every variant: a launch adds at most eight blocks one after the other, and two levels do."""
    found = {}
    for entry in catalog.MODEL_ENTRIES:
        if entry.direction == "backward":
            launches = [one for one in catalog.launches(entry, batch) if one.name == "sum_partials_kernel"]
            found[entry.name] = [one.argument("STEPS") for one in launches]
    assert sum(map(len, found.values())) > 0
    assert max(steps for chain in found.values() for steps in chain) <= partial_sums.MAX_STEPS == 8
    assert max(map(len, found.values())) <= 2


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 1024, 1025, 20_000, 140_000])
def test_partials_of_any_number_of_rows(rows):
    partials = torch.randn(rows, 9)
    wide = partials.double()
    assert_matches(sum_partials(partials), wide.sum(0), terms=rows, magnitude=wide.abs().sum(0))

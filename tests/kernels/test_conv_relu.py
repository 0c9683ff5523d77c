"""Convolution with bias and ReLU, every form against float64."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches

from fastalex.kernels.conv_relu import FORMS, conv_relu, unsupported
from fastalex.kernels.registers import interpreting


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sample(shape, features, kernel, groups, dtype, bias_dtype=None):
    """x, weight and bias; the weight's scale keeps outputs near 1."""
    fan = shape[1] // groups * kernel[0] * kernel[1]
    x = last(torch.randn(shape).to(dtype))
    weight = last((torch.randn(features, shape[1] // groups, *kernel) / fan**0.5).to(dtype))
    return x, weight, torch.randn(features).to(bias_dtype or dtype)


def truth(x, weight, bias, stride, padding, dilation, groups):
    """float64 before the ReLU, and the sum of the absolute values that are added."""
    (top, bottom), (left, right) = padding

    def convolved(x, weight, bias):
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)

    bias = None if bias is None else bias.double()
    magnitude = convolved(x.double().abs(), weight.double().abs(), None if bias is None else bias.abs())
    return convolved(x.double(), weight.double(), bias), magnitude


CASES = {
    "3x3": ((3, 32, 3, 4), 32, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 2),
    "odd": ((2, 7, 4, 3), 5, (2, 3), (2, 1), ((1, 0), (0, 2)), (1, 2), 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype, form):
    shape, features, kernel, *geometry = CASES[case]
    x, weight, bias = sample(shape, features, kernel, geometry[-1], dtype)
    if unsupported(form, x, weight, *geometry):
        pytest.skip("not for this form")
    expected, magnitude = truth(x, weight, bias, *geometry)
    y = conv_relu(x, weight, bias, *geometry, form=form)
    assert y.is_contiguous(memory_format=torch.channels_last)
    truncates = dtype == torch.bfloat16 and interpreting()
    terms = weight[0].numel() + 1
    assert_matches(y, expected.relu(), terms=terms, magnitude=magnitude, truncates=truncates)

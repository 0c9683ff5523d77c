"""Small convolutions of every geometry, three calls of each and a gradient, in children: none dies, none differs."""

import os
import random

import pytest
import torch
import torch.nn.functional as TF

from fastalex import functional as F


def geometries(count, seed):
    """(x, weight, bias or not, channels_last or not, stride, padding, dilation, groups), shapes first."""
    pick = random.Random(seed)
    found = []
    while len(found) < count:
        groups = pick.choice([1, 1, 1, 2, 3])
        channels, features = pick.randint(1, 6) * groups, pick.randint(1, 6) * groups
        size, window = [(pick.randint(1, most), pick.randint(1, most)) for most in (16, 5)]
        stride, padding, dilation = [(pick.randint(a, b), pick.randint(a, b)) for a, b in ((1, 4), (0, 5), (1, 4))]
        if all(size[i] + 2 * padding[i] > dilation[i] * (window[i] - 1) for i in (0, 1)):
            shapes = (pick.randint(1, 3), channels, *size), (features, channels // groups, *window)
            found.append((*shapes, pick.random() < 0.5, pick.random() < 0.5, stride, padding, dilation, groups))
    return found


def check(x_shape, weight_shape, with_bias, last, stride, padding, dilation, groups):
    x, weight = torch.randn(x_shape), torch.randn(weight_shape)
    bias = torch.randn(weight_shape[0]) if with_bias else None
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    # float64 is not oneDNN's, which dies of some
    wide = [t if t is None else t.double() for t in (x, weight, bias)]
    expected = TF.conv2d(*wide, stride, padding, dilation, groups).relu().float()
    for _ in range(3):
        got = F.conv2d_relu(x, weight, bias, stride, padding, dilation, groups)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    F.conv2d_relu(x.requires_grad_(), weight.requires_grad_(), bias, stride, padding, dilation, groups).sum().backward()


@pytest.mark.parametrize(("count", "seed"), [(1000, 0), pytest.param(5000, 1, marks=pytest.mark.slow)])
def test_geometries(count, seed):
    found = geometries(count, seed)
    failures = []
    begin = 0
    while begin < count:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for i in range(begin, count):
                torch.manual_seed(i)
                os.write(writer, f"{i}\n".encode())
                try:
                    check(*found[i])
                except BaseException as error:
                    os.write(writer, f"{i} {type(error).__name__}\n".encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            lines = file.read().split("\n")[:-1]
        status = os.waitpid(child, 0)[1]
        failures += [line for line in lines if " " in line]
        begin = count
        if status:
            begin = int(lines[-1].split()[0]) + 1
            failures.append(f"{begin - 1} died of {status}")
    assert not failures, [(line, found[int(line.split()[0])]) for line in failures[:5]]

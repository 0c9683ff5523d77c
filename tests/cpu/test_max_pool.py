"""fastalex.cpu.max_pool against PyTorch, the reference and the definition of the window codes."""

import pytest
import torch
from tolerances import assert_matches

from fastalex.cpu.max_pool import max_pool_bwd, max_pool_fwd, max_pool_indices
from fastalex.kernels import geometry

WINDOWS = [  # kernel, stride, padding, dilation, ceil_mode
    ((3, 3), (2, 2), (0, 0), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), (1, 1), True),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 2), (1, 3), (1, 0), (2, 1), False),
    ((5, 4), (2, 1), (2, 2), (1, 2), False),
    ((11, 11), (3, 3), (5, 5), (1, 1), False),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def code_table(kernel):
    rows, columns = kernel
    return {geometry.cell_code(r, c, rows, columns): (r, c) for r in range(rows) for c in range(columns)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_codes_and_gradient(dtype, window, layout):
    # few different values: many ties
    x = torch.randint(-3, 4, (3, 6, 15, 14)).to(dtype).to(memory_format=layout)
    x[0, 0, 3:7, 2:9], x[1, 1, 4, 4], x[1, 1, 5, 3], x[2] = -torch.inf, torch.nan, torch.nan, x[2] * 0
    *geometry, ceil_mode = window
    y, codes = max_pool_fwd(x, *geometry, ceil_mode)
    expected, indices = torch.nn.functional.max_pool2d(x.contiguous(), *window, return_indices=True)
    assert torch.equal(y.nan_to_num(99, 100, -100), expected.nan_to_num(99, 100, -100))
    assert torch.equal(max_pool_indices(codes, (15, 14), *geometry), indices)
    assert y.is_contiguous(memory_format=layout)
    assert codes.is_contiguous(memory_format=layout)

    kernel, stride, padding, dilation = geometry
    cells = code_table(kernel)
    for i in range(0, y.shape[2], 2):
        for j in range(0, y.shape[3], 2):
            r, c = cells[int(codes[1, 2, i, j])]
            row, column = i * stride[0] - padding[0] + r * dilation[0], j * stride[1] - padding[1] + c * dilation[1]
            assert int(indices[1, 2, i, j]) == row * 14 + column

    grad = torch.randn(y.shape).to(dtype).to(memory_format=layout)
    dx = max_pool_bwd(grad, codes, (15, 14), *geometry)
    flat = torch.zeros(3, 6, 15 * 14, dtype=torch.float64)
    magnitude = flat.clone().scatter_add_(2, indices.flatten(2), grad.double().abs().flatten(2)).view(x.shape)
    flat.scatter_add_(2, indices.flatten(2), grad.double().flatten(2))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    cells_of = kernel[0] * kernel[1]
    assert dx.is_contiguous(memory_format=layout)
    assert_matches(dx, flat.view(x.shape), terms=cells_of, magnitude=magnitude, compute_dtype=compute)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dead_windows_receive_no_gradient(layout):
    x = torch.randn(2, 8, 11, 11).sub(1.0).relu().to(memory_format=layout)
    window = (3, 3), (2, 2), (0, 0), (1, 1)
    y, codes = max_pool_fwd(x, *window, False, after_relu=True)
    assert (y == 0).any()
    assert torch.equal(codes == geometry.no_cell(3, 3), y == 0)
    grad = torch.randn_like(y)
    dx = max_pool_bwd(grad, codes, (11, 11), *window)
    plain = max_pool_bwd(grad, max_pool_fwd(x, *window, False)[1], (11, 11), *window)
    assert torch.equal(dx, plain * (x > 0))
    assert not torch.equal(dx, plain)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_narrower_than_a_window(width, layout):
    x = torch.randn(2, 5, 9, width).to(memory_format=layout)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    y, codes = max_pool_fwd(x, *geometry, False)
    expected, indices = torch.nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(max_pool_indices(codes, (9, width), *geometry), indices)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_between_whose_cells_the_input_lies(layout):
    """Padding in the first column, behind the last in the second: no number, and nobody to take a gradient."""
    x = torch.randn(2, 5, 4, 3).to(memory_format=layout)
    window = (2, 2), (3, 4), (1, 1), (3, 4)
    y, codes = max_pool_fwd(x, *window, True)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, *window, True))
    assert (y == -torch.inf).all()
    assert (max_pool_bwd(torch.ones_like(y), codes, (4, 3), *window) == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_images(layout, threads):
    x = torch.randn(9, 96, 27, 27).to(memory_format=layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        geometry = (3, 3), (2, 2), (0, 0), (1, 1)
        y, codes = max_pool_fwd(x, *geometry, False)
        expected, indices = torch.nn.functional.max_pool2d(x, 3, 2, return_indices=True)
        assert torch.equal(y, expected)
        assert torch.equal(max_pool_indices(codes, (27, 27), *geometry), indices)
        assert torch.equal(max_pool_fwd(x, *geometry, False, codes=False)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_empty_batch_and_views():
    geometry = (3, 3), (2, 2), (0, 0), (1, 1)
    y, codes = max_pool_fwd(torch.empty(0, 3, 7, 7), *geometry, False)
    assert y.shape == codes.shape == (0, 3, 3, 3)
    assert max_pool_bwd(y, codes, (7, 7), *geometry).shape == (0, 3, 7, 7)
    x = torch.randn(2, 6, 9, 9)[:, ::2, 1:]
    y, codes = max_pool_fwd(x, *geometry, False)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 3, 2))
    expanded = torch.ones(()).expand(y.shape)
    assert torch.equal(
        max_pool_bwd(expanded, codes, (8, 9), *geometry), max_pool_bwd(expanded.clone(), codes, (8, 9), *geometry)
    )

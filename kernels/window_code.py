"""Which cell of a pooling window held the maximum, in one byte.

Forward pooling writes one code per output element (0.24 bytes per input element for 3x3 windows with
stride 2, where int64 indices cost 1.9) and backward reads it.  Every backend writes the same codes.

Small windows (rows + columns <= 6: 3x3, 2x2, 3x2, 1x5, ...) use two inverted one-hot fields, the row in the
high bits and the column in the low bits, earlier cells in higher bits.  Backward then tests four packed
codes without unpacking them: cell (r, s) is the maximum where ``code & one_hot(r, s) == 0``.  Before the
inversion an earlier cell has the larger number, so the integer maximum of (value, one_hot) pairs resolves
ties as PyTorch does, in favour of the first cell in row-major order.

Larger windows, up to 127 cells, use the row-major number of the cell.

``dead(window)`` matches no cell: the output receives no gradient.  It is written where a pooled ReLU output is zero.
"""

MAX_CELLS = 127


def is_one_hot(rows: int, columns: int) -> bool:
    """Whether windows of this size use the inverted one-hot form."""
    return rows + columns <= 6


def one_hot(row: int, column: int, rows: int, columns: int) -> int:
    """The two bits of cell (row, column), before inversion."""
    return 1 << (columns + rows - 1 - row) | 1 << (columns - 1 - column)


def dead(rows: int, columns: int) -> int:
    """The code that matches no cell."""
    return (1 << rows + columns) - 1 if is_one_hot(rows, columns) else MAX_CELLS


def code(row: int, column: int, rows: int, columns: int) -> int:
    """The byte stored for cell (row, column) of a window of rows x columns cells."""
    if is_one_hot(rows, columns):
        return dead(rows, columns) ^ one_hot(row, column, rows, columns)
    return row * columns + column

"""docs/passes.svg shows what is counted."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.stage_traffic import counted, drawing

ROOT = Path(__file__).parents[2]


def test_the_picture_of_passes():
    bars = counted()
    forward, backward = (bars[f"PyTorch, {way}"] for way in ("forward", "backward"))
    # what eager reads and writes of 96 x 55 x 55 values of two bytes is known
    values = 96 * 55 * 55 * 2 / 1e6
    assert forward[0] == ("relu", pytest.approx(2 * values))
    assert backward[-1] == ("relu", pytest.approx(3 * values))
    again = "draw it again: TRITON_INTERPRET=1 python -m benchmarks.stage_traffic docs/passes.svg"
    assert drawing(bars) == (ROOT / "docs" / "passes.svg").read_text(), again

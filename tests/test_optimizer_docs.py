"""docs/optimizer.md: its code runs, in this order."""

import re
from pathlib import Path

import torch

import fastalex

PAGE = (Path(__file__).parents[1] / "docs" / "optimizer.md").read_text()


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the size that the page is about takes seconds for a step
    monkeypatch.setattr(fastalex, "AlexNet", small)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks[:2]:
        exec(block, names)
    model, plain = names["model"], names["plain"]
    with names["optimizer"].joined():
        for mine, saved in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, saved)
    exec(blocks[2], names)
    assert names["optimizer"].param_groups[0]["lr"] == 0.001


def small(classes):
    return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, classes))

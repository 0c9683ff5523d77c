"""The documentation as a site: every public name is in it, its code runs, and it is built without a broken link."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")

import torch

import fastalex
from fastalex import cli
from fastalex.variants import VARIANTS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def make_site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(pages):
    """Names that a page of the reference describes or leads to."""
    text = "\n".join(pages.values())
    return set(re.findall(r"heading: (\S+)", text)) | set(re.findall(r"^- \[?`([\w.]+)`", text, re.MULTILINE))


def test_every_public_name_is_described(make_site):
    names = described(make_site.reference())
    expected = {f"fastalex.{name}" for name in fastalex.__all__}
    for name in fastalex.__all__:
        module = getattr(fastalex, name)
        expected |= {f"{module.__name__}.{inner}" for inner in getattr(module, "__all__", ())}
    classes = [value for value in vars(fastalex.nn).values() if isinstance(value, type)]
    expected |= {f"fastalex.nn.{c.__name__}" for c in classes if c.__module__ == "fastalex.nn"}
    assert expected - names == set()
    assert len(expected) > 20


def test_every_command_is_in_the_reference(make_site, monkeypatch):
    monkeypatch.setenv("COLUMNS", "88")
    text = make_site.command_line()
    for command in (*cli.COMMANDS, "visualize similar", "experiment ablation"):
        assert f"## fastalex {command}\n" in text
        assert f"usage: fastalex {command} " in text


def test_links_lead_to_pages_or_to_the_repository(make_site):
    text = "[a](docs/data.md#how-fast) [`b`](kernels/lrn.py) [c](#x--y) ![d](docs/predictions.png) [e](https://e.org)"
    web = make_site.repository()
    assert make_site.moved(text, "README.md") == (
        f"[a](data.md#how-fast) [`b`]({web}/blob/main/kernels/lrn.py) [c](#x-y) ![d](predictions.png) [e](https://e.org)"
    )
    assert make_site.moved("[a](../README.md) [b](../benchmarks/results)", "docs/gpu.md") == (
        f"[a](index.md) [b]({web}/tree/main/benchmarks/results)"
    )
    code = "```sh\n[a](docs/data.md)\n```"
    assert make_site.moved(code, "README.md") == code


def test_a_page_that_is_named_nowhere_is_in_the_guide(make_site, tmp_path):
    for name in ("index.md", "data.md", "new.md"):
        (tmp_path / name).touch()
    guide = make_site.navigation(tmp_path)[1]
    assert guide == {"Guide": ["data.md", "new.md"]}


@pytest.mark.slow
def test_the_site(tmp_path):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "docs" / "make_site.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "build" / "site"
    pages = {file.relative_to(site).as_posix(): file.read_text() for file in site.rglob("*.html")}
    assert "fastalex.max_pool2d" in pages["reference/fastalex.functional.html"].replace("functional.", "")
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="?stylesheet[^>]*"https?://')
    assert {name for name, text in pages.items() if loaded.search(text)} == set()


def test_code_of_the_questions(capsys):
    text = (ROOT / "docs" / "faq.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    sizes = re.findall(r"(\w+) \(1, \d+, (\d+), (\d+)\)", capsys.readouterr().out)
    assert sizes == [("code2012", "27", "27"), *((v, "55", "55") for v in ("paper", "torchvision", "bvlc_alexnet"))]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_least_pictures_of_the_questions(name):
    least = {"code2012": 64, "bvlc_alexnet": 67, "caffenet": 67, "bn": 67}.get(name, 63)
    with torch.device("meta"):
        model = fastalex.AlexNet(2, variant=name)
        assert model(torch.zeros(1, 3, least, least)).shape == (1, 2)
        with pytest.raises(ValueError, match="does not fit"):
            model(torch.zeros(1, 3, least - 1, least - 1))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_stored_without_outputs(file):
    cells = json.loads(file.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks(file, tmp_path):
    """Their code runs, cell after cell, as a script: Triton reads the source of its kernels."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    script = tmp_path / f"{file.stem}.py"
    script.write_text("\n".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code"), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr

"""A user's script passes mypy --strict and pyright, against an editable install; and it runs."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import get_args

import pytest

from fastalex.variants import VARIANTS, VariantName

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("script.py")


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_names_of_variants():
    assert get_args(VariantName) == tuple(VARIANTS)


@pytest.mark.slow
def test_the_script_runs():
    run(sys.executable, SCRIPT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """An environment in which fastalex is installed editable, and everything else is that of the tests."""
    folder = tmp_path_factory.mktemp("editable")
    venv.create(folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # setuptools, and torch for the script; the link to this checkout, if the tests' environment has one, comes later
    (site / "zz_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT)
    assert str(ROOT) in run(python, "-c", "import fastalex; print(fastalex.__file__)", cwd=folder)
    return python


@pytest.mark.slow
def test_mypy(editable, tmp_path):
    pytest.importorskip("mypy")
    output = run(sys.executable, "-m", "mypy", "--strict", "--python-executable", editable, SCRIPT, cwd=tmp_path)
    assert "Success" in output


@pytest.mark.slow
def test_mypy_sees_a_mistake(editable, tmp_path):
    """Without types, all of the above would be Any, and assert_type alone would say so."""
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fastalex\n"
        "fastalex.AlexNet(variant='alexnet')\n"
        "fastalex.AlexNet()(1)\n"
        "with fastalex.backend.use('cuda'): pass\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(editable), str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert [f"wrong.py:{line}: error" in done.stdout for line in (2, 3, 4)] == [True] * 3, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["pyright", "basedpyright"])
def test_pyright(editable, checker, tmp_path):
    pytest.importorskip(checker)
    command = [sys.executable, "-m", checker, "--pythonpath", editable, "--level", "error", SCRIPT]
    assert "0 errors" in run(*command, cwd=tmp_path)

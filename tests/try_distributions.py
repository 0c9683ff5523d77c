"""Build wheel and source distribution, and try them in environments of their own: `make dist-test`, or

    python tests/try_distributions.py [3.10 3.12 ...]

With every Python from 3.10 to 3.14 that is found: the wheel installs with its requirements, imports, trains a step and
answers on the command line; the source distribution's own tests of the package and the documents pass.  Where no
PyTorch is to be had for a Python, the wheel is installed alone and its files are compiled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
STEP = """
import importlib.metadata, torch, fastalex
assert importlib.metadata.version("fastalex") == fastalex.__version__
model = fastalex.AlexNet(4, variant="paper")
loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 224, 224)), torch.tensor([0, 3]))
loss.backward()
assert all(p.grad is not None for p in model.parameters())
print(f"fastalex {fastalex.__version__}, torch {torch.__version__}: loss {loss.item():.3f}")
"""
# of the source distribution: quick, and of what is read from its files
TESTS = ("tests/test_documents.py", "tests/test_imports.py", "tests/test_reference.py", "tests/test_package.py")


class Failed(Exception):
    pass


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def find(version: str) -> str | None:
    """A Python of this version that runs; a version manager's link may lead nowhere."""
    for name in (f"python{version}", *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


def build(folder: Path) -> tuple[Path, Path]:
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def environment(interpreter: str, folder: Path) -> Path:
    run(interpreter, "-m", "venv", folder)
    return folder / "bin" / "python"


def try_one(interpreter: str, wheel: Path, sdist: Path, folder: Path) -> str:
    """What was seen, in a line.  Raises Failed."""
    python = environment(interpreter, folder / "environment")
    install = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    try:
        run(*install, f"{wheel}[test]")
    except Failed as error:
        if "No matching distribution" not in str(error):
            raise
        run(*install, "--no-deps", wheel)
        (package,) = (folder / "environment").glob("lib/python*/site-packages/fastalex")
        run(python, "-W", "error", "-m", "compileall", "-q", package)
        return "its requirements are not to be had: installed alone, compiled"
    seen = run(python, "-c", STEP, cwd=folder)
    run(folder / "environment" / "bin" / "fastalex", "describe", "--variant", "demo", cwd=folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    (source,) = (child for child in folder.iterdir() if child.name.startswith("fastalex-"))
    passed = run(python, "-m", "pytest", "-q", "-m", "not slow", *TESTS, cwd=source).splitlines()[-1]
    return f"{seen}; tests of the source distribution: {passed}"


def main(versions: list[str]) -> None:
    failed = False
    with tempfile.TemporaryDirectory() as name:
        wheel, sdist = build(Path(name) / "dist")
        print(f"{wheel.name} {wheel.stat().st_size:,} bytes, {sdist.name} {sdist.stat().st_size:,} bytes", flush=True)
        for version in versions:
            interpreter = find(version)
            if interpreter is None:
                print(f"{version}: no such Python here", flush=True)
                continue
            folder = Path(name) / version
            folder.mkdir()
            try:
                print(f"{version}: {try_one(interpreter, wheel, sdist, folder)}", flush=True)
            except Failed as error:
                failed = True
                print(f"{version}: FAILED: {error}", flush=True)
            shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:] or list(VERSIONS))

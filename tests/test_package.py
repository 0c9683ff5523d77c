"""What is built and installed, and what an import costs."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# what only the command line, the kernels or a picture need
HEAVY = ("PIL", "matplotlib", "rich", "safetensors", "torchvision", "triton", "tyro")


def python(script, *arguments, cwd=None, **environment):
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd or ROOT, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_nothing_heavy():
    """Compared with `import torch` alone, since torch itself may load some of these."""
    loaded = "import sys, {}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    extra = set(python(loaded.format("fastalex")).split()) - set(python(loaded.format("torch")).split())
    assert "fastalex" in extra
    assert not extra & set(HEAVY)


def test_import_forward_and_backward_without_triton():
    script = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "triton" else find(name, *rest)
import torch, fastalex
model = fastalex.AlexNet(10)
model(torch.randn(1, 3, 224, 224)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
assert "triton" not in sys.modules
print(fastalex.HAS_TRITON)
"""
    assert python(script) == "False"


def backend_of_dynamo(*first, **environment):
    """The report of a compilation by name, after these statements; standard error is where TORCH_LOGS writes."""
    script = """
import torch
compiled = torch.compile(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), backend="fastalex")
compiled(torch.randn(1, 3, 5, 5))
assert "fastalex" in torch.compiler.list_backends()
"""
    command = [sys.executable, "-c", "\n".join(first) + script]
    environment = {**os.environ, "TORCH_LOGS": "fastalex", **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 (Conv2d) + 1 (ReLU) -> fastalex.functional.conv2d_relu" in done.stderr


def test_an_import_tells_dynamo_the_backend_and_does_not_import_it():
    backend_of_dynamo("import sys, fastalex", "assert 'torch._dynamo' not in sys.modules")


def test_an_installed_package_need_not_be_imported(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    (entry,) = re.findall(r"^\[project.entry-points.(torch_dynamo_backends)\]\n(.*)", text, re.MULTILINE)
    info = tmp_path / "fastalex-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: fastalex\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[{}]\n{}\n".format(*entry).replace('"', ""))
    backend_of_dynamo("import sys", "assert 'fastalex' not in sys.modules", PYTHONPATH=f"{tmp_path}:{ROOT}")


@pytest.mark.parametrize("missing", ["safetensors", "tyro", "rich", "torchvision", "matplotlib", "PIL"])
def test_import_without_the_command_lines_packages(missing):
    python(f"import sys; sys.modules[{missing!r}] = None; import fastalex; fastalex.AlexNet(2, variant='torchvision')")


def test_commands_without_the_parser_of_the_command_line():
    """Their module can be imported, for what it knows of them; only the program ends, with one line."""
    hidden = "import sys; sys.modules['tyro'] = None; "
    assert python(hidden + "from fastalex import cli; print(len(cli.COMMANDS), cli.verify.__name__)").endswith("verify")
    script = hidden + "sys.argv = ['fastalex', 'demo']; import runpy; runpy.run_module('fastalex', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "fastalex: error: the command line needs tyro: pip install 'fastalex[cli]'\n"


def test_the_version_is_said_once():
    import fastalex

    assignments = [node for node in ast.parse((ROOT / "fastalex" / "__init__.py").read_text()).body]
    (version,) = [n.value.value for n in assignments if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"]
    assert fastalex.__version__ == version
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \["version"\]', project, re.MULTILINE)
    assert version not in project
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_the_address_is_everywhere_the_same():
    """Documents, templates and citation: what looks like an address of the repository is that of pyproject.toml."""
    urls = re.findall(r'^(Repository|Issues|Changelog) = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    address = dict(urls)["Repository"]
    assert len(urls) == 3
    assert all(url.startswith(address) for _, url in urls)
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb"), ROOT / "CITATION.cff"]
    files += (ROOT / ".github").rglob("*.*")
    found = {
        (file.name, match)
        for file in files
        for match in re.findall(r"https://github\.com/[\w-]*/fastalex\b", file.read_text("utf-8"))
    }
    assert {match for _, match in found} == {address}
    assert {name for name, _ in found} >= {"CITATION.cff", "SECURITY.md"}


def test_the_oldest_versions_are_those_of_the_requirements():
    versions = re.search(r"^OLDEST_VERSIONS := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    oldest = re.findall(r"(torch|triton)==([\d.]+)\.\*", versions)
    assert oldest == re.findall(r'^    "(torch|triton)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(oldest) == 2


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and the wheel built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def kernel_files():
    return {f"fastalex/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}


@pytest.mark.slow
def test_wheel_holds_real_kernels_and_no_package_of_that_name(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        assert kernel_files() <= names
        assert all(wheel.getinfo(name).external_attr >> 28 != 0o12 for name in names), "a symbolic link"
        assert wheel.read("fastalex/kernels/registers.py") == (ROOT / "kernels/registers.py").read_bytes()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastalex"}


@pytest.mark.slow
def test_wheel_holds_the_pictures_and_their_notice(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        assert wheel.getinfo("fastalex/data/fashion_mnist/pictures.xz").compress_size < 2_500_000
    notices = {name.partition(".dist-info/licenses/")[2] for name in names}
    assert {"LICENSE", "fastalex/data/fashion_mnist/LICENSE", "fastalex/lpips/LICENSE"} <= notices
    assert "fastalex/py.typed" in names
    assert built[0].stat().st_size < 3_000_000


@pytest.mark.slow
def test_sdist_holds_real_kernels_and_what_its_tests_read(built):
    with tarfile.open(built[1]) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert kernel_files() <= set(members)
    assert all(members[name].isfile() for name in kernel_files())
    read = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if read.returncode:
        pytest.skip("no checkout")
    left_out = {name for name in read.stdout.splitlines() if name not in members}
    assert {name for name in left_out if not name.startswith("kernels/")} <= {".ci/run", "fastalex/kernels"}


@pytest.mark.slow
def test_no_file_is_there_twice(built):
    with zipfile.ZipFile(built[0]) as wheel:
        in_wheel = [wheel.read(name) for name in wheel.namelist()]
    with tarfile.open(built[1]) as sdist:
        files = [m for m in sdist.getmembers() if m.isfile() and ".egg-info/" not in m.name]  # setuptools' own
        in_sdist = [sdist.extractfile(member).read() for member in files]
    for contents in (in_wheel, in_sdist):
        counts = Counter(hashlib.sha256(content).digest() for content in contents if len(content) > 100)
        assert max(counts.values()) == 1


@pytest.mark.slow
def test_installed_wheel_leaves_another_kernels_package_alone(built, tmp_path):
    """Hugging Face's package of kernels is called `kernels` too."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("owner = 'somebody else'")
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    script = """
import fastalex, kernels, pathlib
from fastalex.data import fashion_mnist
from fastalex.kernels import geometry
assert kernels.owner == "somebody else"
assert len(fashion_mnist.load("test").images) == 1000
print(pathlib.Path(fastalex.__file__).parent.parent)
"""
    assert python(script, cwd=tmp_path, PYTHONPATH=str(site)) == str(site)


def test_checkout_leaves_another_kernels_package_alone(tmp_path):
    """Also with the repository first on the path: its `kernels/` has no __init__.py, and a real package wins."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'somebody else'")
    script = "import sys; sys.path[:0] = sys.argv[1:]; import fastalex, kernels; print(kernels.owner)"
    assert python(script, str(ROOT), str(tmp_path)) == "somebody else"

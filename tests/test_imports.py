"""Who imports whom: in no circle, and nothing that knows what is above it.  The files are read, not imported."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the bottom up.  A module belongs to the layer of the longest name here that it begins with, and may import what
# is in its own layer or below.
LAYERS = (
    ("fastalex.kernels",),
    # one question each
    (
        *("fastalex.backend", "fastalex.devices", "fastalex.distributed", "fastalex.fields", "fastalex.files"),
        *("fastalex.late", "fastalex.private", "fastalex.reference", "fastalex.timing", "fastalex.tolerances"),
        "fastalex.words",
    ),
    ("fastalex.cpu", "fastalex.gpu"),
    ("fastalex.ops",),
    ("fastalex.functional", "fastalex.dynamo", "fastalex.choices", "fastalex.optim"),
    ("fastalex.nn",),
    ("fastalex.variants", "fastalex.parallel", "fastalex.data.preprocessing"),
    ("fastalex.card",),
    ("fastalex.hub",),
    ("fastalex.alexnet",),
    ("fastalex.foreign",),
    ("fastalex.weights", "fastalex.describe"),
    ("fastalex.lpips",),
    ("fastalex",),  # what `import fastalex` brings
    ("fastalex.data",),
    ("fastalex.checkpoint",),
    ("fastalex.evaluation",),
    ("fastalex.training",),
    ("fastalex.inspection", "fastalex.results", "fastalex.plan"),
    ("fastalex.check",),
    ("fastalex.gpu.tuning",),
    ("fastalex.visualize",),
    ("fastalex.experiments",),
    # what the commands do
    (
        *("fastalex.demo", "fastalex.data.commands", "fastalex.evaluation.commands", "fastalex.experiments.commands"),
        *("fastalex.gpu.commands", "fastalex.inspection.commands", "fastalex.training.launch"),
        "fastalex.lpips.commands",
        "fastalex.visualize.commands",
    ),
    ("fastalex.cli",),
    ("fastalex.__main__",),
    ("benchmarks",),
)


@functools.cache
def files():
    """{name of a module: its file}, the kernels by the name under which they are imported."""
    found = {}
    for folder, package in (("kernels", "fastalex.kernels"), ("fastalex", "fastalex"), ("benchmarks", "benchmarks")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if (folder, parts[0]) != ("fastalex", "kernels"):
                found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def parents(name):
    """a.b.c -> a.b, a."""
    while name := name.rpartition(".")[0]:
        yield name


@functools.cache
def folders():
    return {parent for name in files() for parent in parents(name)}


def module_of(name):
    """What `from a import b` imports by a.b: that module, or a, which defines b."""
    return name if name in files() or name in folders() else name.rpartition(".")[0]


def statements(node):
    """All below a node, without their expressions."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from statements(child)


@functools.cache
def imported(text, module, is_package=False):
    """The modules that a text imports, in functions and for type checkers too, other people's among them."""
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [module_of(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [None, package, *parents(package)][node.level]
            source = ".".join(part for part in (base, node.module) if part)
            found += [module_of(f"{source}.{alias.name}") for alias in node.names]
    return found


def arrows_from(module, text, is_package=False):
    """The modules that a module imports, and the packages around them, which run first.

    A string that is a module's name counts as an import: import_module and its kin take such.  Whoever got as far as
    the module has run the packages around itself: these count only if it asks them for a name.
    """
    named = re.findall(r'"(fastalex\.[\w.]+)"', text)
    found = {name for name in (*imported(text, module, is_package), *named) if name in files()}
    around = {parent for name in found for parent in parents(name) if parent in files()}
    return (found | around - set(parents(module))) - {module}


def missing_from(module, text, is_package=False):
    """Our modules that a module imports and that are not there, of which an import in a function says nothing yet."""
    ours = (name for name in imported(text, module, is_package) if name.partition(".")[0] in ("fastalex", "benchmarks"))
    return {name for name in ours if name not in files() and name not in folders()}


def each(found):
    """{module: what is found in its text}."""
    return {module: found(module, file.read_text(), file.name == "__init__.py") for module, file in files().items()}


@functools.cache
def arrows():
    return each(arrows_from)


def layer_of(module):
    known = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    # every module begins with the package's name: it stands for itself alone
    names = [module, *(name for name in parents(module) if name != "fastalex")]
    return next((known[name] for name in names if name in known), -1)


def circle(graph):
    """Modules of which each imports the next, the last the first again; None if there is no such circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return None


def rising(graph):
    return [f"{a} -> {b}" for a, targets in graph.items() for b in sorted(targets) if layer_of(b) > layer_of(a)]


def test_every_module_has_a_layer_and_every_layer_a_module():
    assert [module for module in files() if layer_of(module) < 0] == []
    known = files().keys() | folders()
    assert [name for layer in LAYERS for name in layer if name not in known] == []


def test_what_is_imported_is_there():
    assert {module: names for module, names in each(missing_from).items() if names} == {}
    text = "def function():\n    from fastalex.kernels.lrm import lrn_fwd\n    from ..nm import a\n    import torch.nm"
    assert missing_from("fastalex.ops.lrn", text) == {"fastalex.kernels.lrm", "fastalex.nm"}


def test_no_circle():
    assert circle(arrows()) is None
    closed = {**arrows(), "fastalex.backend": {"fastalex.choices"}}
    assert "fastalex.backend" in circle(closed)


def test_no_arrow_runs_up():
    assert rising(arrows()) == []
    assert rising({"fastalex.ops.lrn": {"fastalex.nn", "fastalex.kernels.lrn"}}) == ["fastalex.ops.lrn -> fastalex.nn"]


def test_every_form_of_import_is_an_arrow():
    text = """
import fastalex.nn
from fastalex import fields as f
from fastalex import kernels
from .common import call
from . import lrn
from ..gpu.dispatch import choose
from fastalex.cpu.linear import linear
if TYPE_CHECKING:
    from fastalex.data.image_sets import ImageSet
def function():
    import_module("fastalex.files")
    from fastalex.evaluation import metrics
"""
    assert arrows_from("fastalex.ops.linear", text) == {
        *("fastalex.nn", "fastalex.fields", "fastalex.ops.common", "fastalex.ops.lrn", "fastalex.gpu"),
        *("fastalex.cpu", "fastalex.cpu.linear", "fastalex.data.image_sets", "fastalex.files"),
        *("fastalex.gpu.dispatch", "fastalex.evaluation.metrics"),
    }
    assert "fastalex.ops.lrn" in arrows_from("fastalex.ops", "from .lrn import x", is_package=True)
    assert arrows_from("benchmarks.conftest", "from fastalex import __version__, nn") == {"fastalex", "fastalex.nn"}
    assert arrows_from("fastalex.ops.lrn", "from fastalex import HAS_TRITON, ops") == {"fastalex", "fastalex.ops"}
    assert "fastalex.training.launch" in arrows()["fastalex.cli"]
    assert "fastalex.kernels.registers" in arrows()["fastalex.kernels.lrn"]

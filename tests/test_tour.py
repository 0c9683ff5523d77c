"""docs/tour.md: its code is the kernels', its numbers the compiler's, its exercises break what they say they break."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compiling import compiled

from fastalex.inspection import catalog, compiler, machine_code
from fastalex.kernels.registers import interpreting

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tour.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
QUOTES = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# kernels/")]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python" and not text.startswith("# kernels/")]
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
NUMBERS = re.findall(r"^> `(\S+)` on (\w+): (.+)$", PAGE, re.MULTILINE)
# (diff, test that fails) and (diff, what is compiled)
EXERCISES = re.findall(r"^```diff\n((?:[^`].*\n)+)```\n\n(Check|Compiler): (.+)$", PAGE, re.MULTILINE)
BREAKS = [(diff, test.strip("`")) for diff, how, test in EXERCISES if how == "Check"]
SLOWS = [(diff, text) for diff, how, text in EXERCISES if how == "Compiler"]

BASELINE = machine_code.load(ROOT / "tests" / "kernels" / "baseline.json")


def test_the_page_is_read_whole():
    assert len(PAGE.split("\n## ")) == 12
    assert len(BLOCKS) == len(QUOTES) + len(PROGRAMS) + len(BREAKS) + len(SLOWS) + 1
    assert min(map(len, (QUOTES, PROGRAMS, COMMANDS, NUMBERS, BREAKS, SLOWS))) > 0
    assert PAGE.count("**Exercise.**") == len(BREAKS) + len(SLOWS) == 9
    assert PAGE.count("\n> ") == len(NUMBERS)


# ---- quotations


def missing(quote, file):
    """The first lines of a quotation that do not stand in the file as they do here, behind the ones before; None."""
    place = 0
    for part in re.split(r"^ *\.\.\.\n", quote, flags=re.MULTILINE):
        found = f"\n{file}".find(f"\n{part}", place)
        if found < 0:
            return part
        place = found + len(part)
    return None


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote.partition("\n")[0][2:])
def test_quotations(quote):
    head, _, text = quote.partition("\n")
    assert missing(text, (ROOT / head[2:]).read_text()) is None
    assert len(text.splitlines()) <= 30


def test_a_wrong_quotation_is_noticed():
    file = "def f(x):\n    a = 1\n    b = 2\n    return a\n"
    assert missing("    a = 1\n    ...\n    return a\n", file) is None
    assert missing("    b = 2\n    ...\n    a = 1\n", file) == "    a = 1\n"
    assert missing("    a = 1\n    return a\n", file) == "    a = 1\n    return a\n"
    assert missing("  a = 1\n", file) == "  a = 1\n"


# ---- what is run


@pytest.mark.skipif(not interpreting(), reason="says that it needs no GPU")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    exec(program, {})


def run(command, folder, **environment):
    """The finished process of a command in a folder with the whole house; "python" is this one."""
    arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    done = run(command, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- numbers


def sentence(row):
    """What the page says of a launch."""
    parts = [f"{row['registers']} registers", f"loads {machine_code.widths(row['loads'])}"]
    if row["copies"]:
        parts.append(f"async {machine_code.widths(row['copies'])}")
    if row["tiles"]:
        parts.append(f"{row['tiles']} tiles")
    parts.append(f"stores {machine_code.widths(row['stores'])}")
    if row["main_loop"]:
        parts.append(f"{machine_code.per_product(row):.1f} instructions per matrix instruction in the loop")
    else:
        parts.append(f"{row['instructions']:.1f} instructions per element")
    return ", ".join(parts)


def row_of(entry, target):
    """Of the first launch: out of the baseline if it has today's kernel, else compiled."""
    kernel = catalog.launches(catalog.ENTRIES[entry])[0].name
    for row in BASELINE["rows"]:
        if (row["entry"], row["target"], row["kernel"]) == (entry, target, kernel):
            return row
    if BASELINE["triton"] != triton.__version__:
        pytest.skip("another Triton compiles to other code")
    return compiler.results([(entry, target)])[entry, target][0]


@pytest.mark.skipif(not interpreting(), reason="launchers ask the device for its memory")
@pytest.mark.parametrize(("entry", "target", "text"), NUMBERS)
def test_numbers(entry, target, text):
    assert text == sentence(row_of(entry, target))


def test_instructions_that_take_as_long_as_four_bytes():
    row = next(row for row in BASELINE["rows"] if row["entry"] == NUMBERS[0][0])
    times = row["modelled_us"]["H100"]
    instructions = row["instructions"] / times["issue"] / (row["dram"] / times["DRAM"]) * 4
    assert f"{instructions:.0f} of them take an H100 as long as 4 bytes" in " ".join(PAGE.split())


@pytest.mark.skipif(BASELINE["triton"] != triton.__version__, reason="another Triton compiles to other code")
def test_shuffles_of_a_gather():
    """Of the kernel for any window, which no layer of the catalogue takes."""
    types = {"x_ptr": "*fp16", "y_ptr": "*fp16", "rows": "i32"}
    constants = {"plane": 1, "CHANNELS": 96, "BELOW": 20, "ABOVE": 20, "SCALE": 0.1, "BETA": 0.75, "K": 2.0}
    constants |= {"ASM": True, "LARGE": False, "BLOCK": 16, "TILE": 128}
    job = ("lrn", "lrn_fwd_any_window_kernel", types, constants, 90)
    shuffles = compiled({"forward": job})["forward"]["ptx"].count("shfl.sync")
    assert f"a thread issues {shuffles} shuffles (sm_90) for its {16 * 128 // 128} elements" in " ".join(PAGE.split())


# ---- exercises


def sides(diff):
    """The file of an exercise, and its lines before and after."""
    head, *lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    return head[2:], before, after


def names_of(exercises):
    return [sides(diff)[0] for diff, _ in exercises]


@pytest.mark.parametrize("diff", [diff for diff, _ in BREAKS + SLOWS], ids=names_of(BREAKS + SLOWS))
def test_exercises_can_be_made(diff):
    file, before, after = sides(diff)
    assert f"\n{(ROOT / file).read_text()}".count(f"\n{before}") == 1
    assert before != after


@pytest.mark.parametrize("test", [test for _, test in BREAKS])
def test_their_tests_exist(test):
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text()


@pytest.fixture
def house(tmp_path):
    """A copy to break."""
    for folder in ("fastalex", "kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def change(house, diff):
    file, before, after = sides(diff)
    path = house / file
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="reads what the interpreter reads beside a tensor")
@pytest.mark.parametrize(("diff", "test"), BREAKS, ids=names_of(BREAKS))
def test_exercises_break_their_tests(diff, test, house):
    change(house, diff)
    done = run(f"python -m pytest -x -q -p no:cacheprovider {test}", house, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout


COMPILE = """
import sys
from fastalex.inspection import compiler, machine_code
row = compiler.compile_entry(sys.argv[1], "sm_90")[0]
print(*(f"{key} {machine_code.widths(row[key])}" for key in ("loads", "stores")), sep=", ")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("diff", "text"), SLOWS, ids=names_of(SLOWS))
def test_exercises_change_the_code(diff, text, house):
    (entry,) = re.findall(r"--kernel ([^`]+)`", PAGE.partition(diff)[0].split("**Exercise.**")[-1])
    change(house, diff)
    (house / "compile.py").write_text(COMPILE)
    done = run(f"python compile.py {entry}", house, TRITON_INTERPRET="0")
    assert done.stdout.strip() == text, done.stderr


# ---- what can be taken along

ALONE = """
import runpy, sys
import torch
runpy.run_path(sys.argv[1])["mend"]()
from mine import lrn, max_pool

def both(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y.detach(), grad, torch.autograd.grad(y, x, grad)[0]

for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 8, 7, 9).contiguous(memory_format=layout)
    for size in (5, 13):
        y, grad, dx = both(lambda x: torch.nn.functional.local_response_norm(x, size, 2.0, 0.75, 1.5), x)
        torch.testing.assert_close(lrn.lrn_fwd(x, size, 2.0, 0.75, 1.5), y)
        torch.testing.assert_close(lrn.lrn_bwd(grad, x, size, 2.0, 0.75, 1.5), dx)
    # of 3 with stride 2, which has a kernel of its own, and another
    for window in ((3, 2, 0, 1), (2, 1, 1, 2)):
        y, grad, dx = both(lambda x: torch.nn.functional.max_pool2d(x, *window), x)
        pairs = [(number, number) for number in window]
        pooled, codes = max_pool.max_pool_fwd(x, *pairs, False)
        assert torch.equal(pooled, y)
        torch.testing.assert_close(max_pool.max_pool_bwd(grad, codes, (7, 9), *pairs), dx)
assert not any(name.partition(".")[0] in ("fastalex", "kernels") for name in sys.modules)
"""


def test_kernels_can_be_taken_along(tmp_path):
    """LRN and max-pool, both ways and in both layouts, as a package of their own."""
    package = tmp_path / "mine"
    package.mkdir()
    for name in ("lrn", "max_pool", "max_pool_3x3s2", "geometry", "registers"):
        shutil.copy(ROOT / "kernels" / f"{name}.py", package)
    (package / "__init__.py").touch()
    (tmp_path / "alone.py").write_text(ALONE)
    mend = ROOT / "fastalex" / "inspection" / "interpreter.py"
    done = run(f"python alone.py {shlex.quote(str(mend))}", tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr

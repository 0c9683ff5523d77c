"""What the documents name is there: files, links and their headings, tests, targets of make."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
FOLDERS = ("benchmarks", "docs", "fastalex", "kernels", "tests")


def prose(text):
    """Without code."""
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """What GitHub makes of headings."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(text, folder):
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = folder / file
        if not path.exists() or (anchor and anchor not in anchors(path.read_text() if file else text)):
            found.append(target)
    return found


def missing_names(text):
    """Paths of ours in backticks and commands, `tests/test_x.py::test_y` among them, that are not there."""
    found = []
    commands = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for name in [*re.findall(r"`([^`\n]+)`", text), *" ".join(commands).split()]:
        file, _, test = name.partition("::")
        if not re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", file):
            continue
        path = ROOT / file
        if not path.exists() or (test and f"def {test}(" not in path.read_text()):
            found.append(name)
    return found


def missing_targets(text):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) - targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_documents_name_is_there(document):
    text = document.read_text()
    assert broken_links(text, document.parent) == []
    assert missing_names(text) == []
    assert missing_targets(text) == set()


def test_what_is_missing_is_noticed():
    links = "[a](nowhere.md) [b](gpu.md#nothing) [c](gpu.md#kernels) [d](#e)"
    assert broken_links(links, ROOT / "docs") == ["nowhere.md", "gpu.md#nothing", "#e"]
    assert missing_names("`kernels/layout.py` `tests/test_tour.py::test_none` `kernels/lrn.py`") == [
        *("kernels/layout.py", "tests/test_tour.py::test_none")
    ]
    assert missing_names("```sh\npython -m pytest tests/test_none.py\n```") == ["tests/test_none.py"]
    assert missing_targets("make demo\n`make tea`") == {"tea"}

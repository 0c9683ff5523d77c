"""Make the documentation as a site, build/site: `make docs`, or

    python docs/make_site.py

The pages of this folder, README.md and others of the repository, a reference of the Python names out of their
docstrings and one of the command line out of its `--help` are written to build/docs, and Zensical makes HTML of them.
A broken link ends it.  It asks no network, and neither does the site.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import fastalex
from fastalex import cli

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"

# where files lie in the repository -> their pages
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
# sections of the site, with the pages of this folder in their order; pages that are named nowhere end the guide
SECTIONS: dict[str, list[str]] = {
    "Guide": [
        *(
            "training.md",
            "notebooks/fine_tuning.md",
            "imagenet.md",
            "weights.md",
            "data.md",
            "lpips.md",
            "pytorch.md",
            "cli.md",
        ),
        *("gallery.md", "faq.md"),
    ],
    "Speed": ["benchmarks.md", "gpu.md", "cpu.md", "dispatch.md", "scaling.md"],
    "Kernels": ["tour.md", "notebooks/tour.md", "kernels.md", "adding_a_kernel.md"],
}
PROJECT = ["changelog.md", "contributing.md", "security.md"]


class Module(NamedTuple):
    """A page of the reference: what of a module is public."""

    name: str
    names: tuple[str, ...] = ()  # by default its __all__


MODULES = (
    Module("fastalex"),
    Module("fastalex.functional"),
    Module("fastalex.nn", ("ConvReLU2d", "LocalResponseNorm", "MaxPool2d", "LRNMaxPool2d", "LinearReLUDropout")),
    Module("fastalex.optim"),
    Module("fastalex.variants", ("Variant", "Conv", "BatchNorm", "VARIANTS", "find_variant")),
    Module("fastalex.backend", ("HAS_TRITON", "MODES", "current", "use", "refusal")),
    Module("fastalex.choices", ("explain", "operator_calls")),
    Module("fastalex.dynamo"),
    Module("fastalex.weights", ("load_weights",)),
    Module("fastalex.checkpoint", ("ModelCard", "load_model", "save_model")),
    Module("fastalex.parallel", ("one_weird_trick",)),
    Module("fastalex.data.choose", ("open_images",)),
    Module("fastalex.data.image_sets", ("ImageSet", "FashionMNIST", "Folders")),
    Module("fastalex.data.packed", ("PackedSet", "verify")),
    Module("fastalex.data.pack", ("pack",)),
    Module("fastalex.data.preprocessing", ("Preprocessing",)),
    Module("fastalex.training.prepare", ("build_model",)),
    Module("fastalex.training.loop", ("train",)),
    Module("fastalex.training.recipes", ("Recipe", "RECIPES")),
    Module("fastalex.training.options", ("Options",)),
    Module("fastalex.evaluation.metrics", ("evaluate", "Scores", "ten_crop_probabilities")),
)


def repository() -> str:
    """The address of the repository, which pyproject.toml knows."""
    return re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ pages that are there
def place_of(path: str) -> str | None:
    """Where a file of the repository lies in the site; None if it is not in it."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and path.endswith((".md", ".png", ".svg", ".ipynb", ".css")):
        return path.removeprefix("docs/")
    return None


def moved(text: str, path: str) -> str:
    """The text of a file of the repository as a page: links lead to pages, or to the repository on the web."""
    here = place_of(path)
    assert here is not None

    def link(match: re.Match[str]) -> str:
        target, mark, anchor = match[2].partition("#")
        if re.match(r"\w+:", target):
            return match[0]
        anchor = re.sub("-+", "-", anchor)  # as Markdown's toc names headings; GitHub keeps both dashes of "a + b"
        if not target:
            return f"{match[1]}(#{anchor})"
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        place = place_of(file)
        if place is None or place.endswith(".ipynb"):
            kind = "tree" if (ROOT / file).is_dir() else "blob"
            return f"{match[1]}({repository()}/{kind}/main/{file}{mark}{anchor})"
        return f"{match[1]}({posixpath.relpath(place, posixpath.dirname(here) or '.')}{mark}{anchor})"

    fenced = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else re.sub(r"(\])\(([^)\s]+)\)", link, part) for part in fenced.split(text)
    )


def notebook(text: str) -> str:
    """A notebook as Markdown: its outputs are left out, as they are in the file."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def written(folder: Path) -> None:
    """Write what is there already, and what it shows."""
    files = [*PAGES, *(f"docs/{file.relative_to(ROOT / 'docs').as_posix()}" for file in (ROOT / "docs").rglob("*.*"))]
    for path in files:
        place = place_of(path)
        if place is None:
            continue
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".md"):
            target.write_text(moved((ROOT / path).read_text("utf-8"), path), "utf-8")
        elif path.endswith(".ipynb"):
            target.with_suffix(".md").write_text(notebook((ROOT / path).read_text("utf-8")), "utf-8")
        else:
            shutil.copyfile(ROOT / path, target)


# ----------------------------------------------------------------------------------------------------- the Python names
def public(module: Module) -> dict[str, str]:
    """{name: where it is defined} of a page."""
    found = importlib.import_module(module.name)
    places = {}
    for name in module.names or found.__all__:
        value = getattr(found, name)
        if isinstance(value, ModuleType):
            places[name] = value.__name__
        elif inspect.isfunction(value) or inspect.isclass(value):
            places[name] = f"{value.__module__}.{value.__qualname__}"
        else:
            places[name] = next(
                f"{owner}.{name}"
                for owner in (module.name, "fastalex.backend")
                if re.search(rf"^{name}\b.* = ", inspect.getsource(importlib.import_module(owner)), re.MULTILINE)
            )
    return places


def reference() -> dict[str, str]:
    """{file: text} of the pages of the Python names; each name is described once, where it first comes."""
    pages, described = {}, {}
    modules = [module for module in MODULES if importlib.util.find_spec(module.name) is not None]
    files = {module.name: f"{module.name}.md" for module in modules}
    for module in modules:
        about = inspect.getdoc(importlib.import_module(module.name)) or ""
        lines, elsewhere = [f"# {module.name}", "", about, ""], []
        for name, place in public(module).items():
            if place in files:
                elsewhere.append(f"- [`{module.name}.{name}`]({files[place]})")
            elif place in described:
                elsewhere.append(f"- `{module.name}.{name}` is [`{described[place]}`][{place}]")
            else:
                described[place] = f"{module.name}.{name}"
                options = [f"      heading: {module.name}.{name}", f"      toc_label: {name}"]
                lines += [f"::: {place}", "    options:", *options, ""]
        pages[f"reference/{files[module.name]}"] = "\n".join([*lines, *elsewhere]) + "\n"
    return pages


# -------------------------------------------------------------------------------------------------------- the commands
def help_of(*command: str) -> str:
    """What `fastalex COMMAND --help` prints, without colours."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()).strip()


def commands() -> Iterator[tuple[str, ...]]:
    """Every command of the program, those of groups too."""
    for name in cli.COMMANDS:
        yield (name,)
        _, _, nested = help_of(name).partition("subcommands")
        for inner in re.findall(r"^[│ ]+• ([\w-]+) ", nested, re.MULTILINE):
            yield name, inner


def command_line() -> str:
    lines = ["# Command line", "", "What each command says with `--help`.", "", "```text", help_of(), "```", ""]
    for command in commands():
        lines += [f"## fastalex {' '.join(command)}", "", "```text", help_of(*command), "```", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- the site
def navigation(folder: Path) -> list[Any]:
    """Sections and pages that are there."""
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*.md")}
    listed = {page for pages in (*SECTIONS.values(), PROJECT) for page in pages}
    sections = {name: [page for page in pages if page in there] for name, pages in SECTIONS.items()}
    first = next(iter(sections))
    sections[first] += sorted(page for page in there - listed - {"index.md"} if not page.startswith("reference/"))
    python = [f"reference/{module.name}.md" for module in MODULES if f"reference/{module.name}.md" in there]
    sections["Reference"] = ["reference/command_line.md", *python]
    return ["index.md", *({name: pages} for name, pages in sections.items()), {"Project": PROJECT}]


def config(folder: Path) -> dict[str, Any]:
    handler = {
        "paths": [str(BUILD / "python")],
        "options": {
            "extensions": [f"{ROOT / 'docs' / 'docstrings.py'}:Parameters"],
            "docstring_style": None,
            "docstring_section_style": "list",
            "heading_level": 2,
            "show_root_heading": True,
            "show_root_full_path": False,
            "show_source": False,
            "show_signature_annotations": True,
            "separate_signature": True,
            "merge_init_into_class": True,
            "show_labels": False,
            "members_order": "source",
            "filters": ["!^_", "!^forward$", "!^extra_repr$"],
            "line_length": 100,
        },
    }
    return {
        "site_name": "fastalex",
        "site_description": fastalex.__doc__,
        # no repo_url: with it every page asks GitHub for its stars
        "extra": {"social": [{"icon": "fontawesome/brands/github", "link": repository(), "name": "source"}]},
        "docs_dir": folder.relative_to(BUILD).as_posix(),
        "site_dir": "site",
        "extra_css": ["site.css"],
        "use_directory_urls": False,  # so that index.html opens as a file
        "nav": navigation(folder),
        "theme": {
            "name": "material",
            "font": False,
            "features": ["navigation.sections", "navigation.top", "content.code.copy", "toc.follow"],
            "palette": [
                {"media": "(prefers-color-scheme: light)", "scheme": "default"},
                {"media": "(prefers-color-scheme: dark)", "scheme": "slate"},
            ],
        },
        # not the plugin "offline": it loads a script from the network
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": handler}}}],
        "markdown_extensions": [
            "tables",
            {"toc": {"permalink": True}},
            {"pymdownx.highlight": {"use_pygments": True}},
            "pymdownx.superfences",
            "md_in_html",
        ],
    }


def copy_package(folder: Path) -> None:
    """The Python files, with an __init__.py in every folder: griffe knows no other folders inside a package."""
    shutil.rmtree(folder, ignore_errors=True)
    for file in (ROOT / "fastalex").rglob("*.py"):
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        for parent in target.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()


def write_sources(folder: Path) -> None:
    """The Markdown of every page, and the configuration beside the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written(folder)
    (folder / "reference").mkdir()
    for name, text in {**reference(), "reference/command_line.md": command_line()}.items():
        (folder / name).write_text(text, "utf-8")
    # JSON is YAML
    (folder.parent / "mkdocs.yml").write_text(json.dumps(config(folder), indent=2) + "\n", "utf-8")


def main() -> None:
    os.environ |= {"COLUMNS": "88", "NO_COLOR": "1"}  # as wide as a page
    copy_package(BUILD / "python")
    write_sources(BUILD / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(BUILD / "mkdocs.yml")]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("the site is not complete: see above")
    site = os.path.relpath(BUILD / "site")
    print(f"open {site}/index.html, or, for its search too: python -m http.server --bind 127.0.0.1 -d {site}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("usage: python docs/make_site.py")
    main()

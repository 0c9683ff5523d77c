"""What `fastalex plan` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from fastalex.files import write_whole
from fastalex.plan import plan, report
from fastalex.visualize.console import console, tell_written


def show(recipe: str, *, json_file: Path | None, **arguments: Any) -> None:
    """Print the plan of a recipe; `json_file` gets its numbers.  arguments: those of `fastalex.plan.plan`."""
    found = plan(recipe, **arguments)
    console.print(Markdown(report(found)))
    if json_file is not None:
        write_whole(json_file, json.dumps(found.to_dict(), indent=2) + "\n")
        tell_written([json_file])

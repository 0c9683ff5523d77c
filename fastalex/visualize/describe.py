"""What `fastalex describe` does."""

from __future__ import annotations

import json
from pathlib import Path

from fastalex.describe import describe
from fastalex.files import write_whole
from fastalex.training.recipes import demo_variant
from fastalex.visualize import figures
from fastalex.visualize.console import print_description


def show(variant: str, classes: int, *, json_file: Path | None, chart: Path | None) -> None:
    """Print the table of a variant's layers; `json_file` gets its numbers, `chart` a drawing of them."""
    description = describe(demo_variant() if variant == "demo" else variant, classes)
    print_description(description)
    if json_file is not None:
        write_whole(json_file, json.dumps(description.to_dict(), indent=2) + "\n")
    if chart is not None:
        figures.layers(description, chart)

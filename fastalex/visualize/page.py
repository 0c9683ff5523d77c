"""A page that holds its pictures: one HTML file, no scripts, nothing to load.

A click on a picture makes it the address's fragment, and the style shows that one over the whole window; a second click
leaves it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from fastalex.files import write_whole

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; } figure.first { border-right: 2px solid #0072b2; padding-right: .6rem; }
img { display: block; image-rendering: pixelated; background: #888; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
a.open { cursor: zoom-in; } a.close { display: none; }
figure:target { position: fixed; inset: 0; z-index: 1; width: auto !important; padding: 0; border: 0; display: flex;
  flex-direction: column; align-items: center; justify-content: center; background: Canvas; }
figure:target img { width: auto; height: 86vh; max-width: 96vw; object-fit: contain; background: none; }
figure:target figcaption { font-size: 1rem; }
figure:target a.close { display: block; position: absolute; inset: 0; cursor: zoom-out; }
"""


class Tile(NamedTuple):
    """uint8 (C, H, W) with one or three channels, and a caption."""

    picture: Tensor
    caption: str


class Section(NamedTuple):
    """Pictures side by side, each `width` CSS pixels wide; `lead` sets the first apart from the others."""

    heading: str
    note: str
    tiles: Sequence[Tile]
    width: int
    lead: bool = False


def data_uri(picture: Tensor) -> str:
    """uint8 (C, H, W) -> a PNG file inside a URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(path: Path, title: str, note: str, sections: Sequence[Section]) -> None:
    body = []
    number = 0
    for heading, text, tiles, width, lead in sections:
        figures = []
        for position, (picture, caption) in enumerate(tiles):
            number += 1
            first = ' class="first"' if lead and position == 0 else ""
            image = f'<img src="{data_uri(picture)}" width="{width}" alt="{escape(caption)}">'
            figures.append(
                f'<figure id="picture-{number}"{first} style="width:{width}px">'
                f'<a class="open" href="#picture-{number}">{image}</a><figcaption>{escape(caption)}</figcaption>'
                '<a class="close" href="#none" aria-label="close"></a></figure>'
            )
        body.append(
            f'<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n<div class="tiles">\n'
            + "\n".join(figures)
            + "\n</div>"
        )
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(note)}</p>\n" + "\n".join(body) + "\n</body>\n</html>\n",
    )

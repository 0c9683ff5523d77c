"""For the reference on the site: the house's docstrings as Markdown, in which a line is no paragraph."""

from __future__ import annotations

import re

from griffe import Class, Docstring, Extension, Function, Object


def as_markdown(text: str, parameters: set[str]) -> str:
    """Lines that begin with names of parameters and a colon become a list; what is raised, a paragraph."""
    lines, in_list = [], False
    for line in text.splitlines():
        names, colon, _ = line.partition(":")
        if colon and names and {name.strip() for name in names.split(",")} <= parameters:
            lines += ([] if in_list else [""]) + [f"- `{names}`" + line[len(names) :]]
            in_list = True
        elif in_list and line.startswith("    "):
            lines.append(line)
        else:
            if in_list or re.match(r"(Raises|Returns|Source:) ?", line):
                lines.append("")
            in_list = False
            lines.append(line)
    return "\n".join(lines)


class Parameters(Extension):
    """Applies `as_markdown` to every docstring of functions and classes."""

    def on_function(self, *, func: Function, **kwargs: object) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class_members(self, *, cls: Class, **kwargs: object) -> None:
        names = {member.name for member in cls.members.values()}
        init = cls.members.get("__init__")
        if isinstance(init, Function):
            names |= {parameter.name for parameter in init.parameters}
        self._rewrite(cls, names)

    def _rewrite(self, of: Object, parameters: set[str]) -> None:
        if of.docstring is not None:
            of.docstring = Docstring(as_markdown(of.docstring.value, parameters), parent=of)

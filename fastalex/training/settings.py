"""What a run was started with, kept in its folder, so that `--resume` alone goes on with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastalex import fields
from fastalex.data.preprocessing import Preprocessing
from fastalex.training.recipes import Recipe

SETTINGS = "settings.json"
Flags = Mapping[str, Any]
"""Arguments of `fastalex train` by their names; None where one was not given, and for a switch False."""

# what makes a run the one that it is, beside the classes and the number of its pictures
FIXED = ("recipe", "variant", "init", "freeze", "backbone_lr", "batch_size", "lr", "label_smoothing", "amp", "seed")


@dataclass(frozen=True)
class Settings:
    """name: of the recipe, before the flags changed it; flags: those that were given, as JSON has them."""

    name: str
    recipe: Recipe
    preprocessing: Preprocessing
    flags: Flags

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Settings | None:
        """Those of the run in a folder; None where there are none.  Raises ValueError for a damaged file."""
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            found = fields.complete("it", cls, json.loads(path.read_text(encoding="utf-8")))
            recipe, looks = Recipe.from_dict(found["recipe"]), Preprocessing.from_dict(found["preprocessing"])
            return cls(str(found["name"]), recipe, looks, dict(found["flags"]))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or of another version of fastalex: {error}") from None

    def continued(self, given: Flags, folder: Path) -> Settings:
        """These settings with what is given now.

        Raises ValueError, naming all that contradicts, for what a run cannot change.
        """
        fixed = {name: getattr(self.recipe, name, None) for name in FIXED}
        fixed |= {"recipe": self.name, "variant": self.recipe.variant.name, "init": self.flags["init"]}
        wrong = [
            f"{argument(name, fixed[name])}, not {given[name]}"
            for name in FIXED
            if given[name] is not None and given[name] != fixed[name]
        ]
        if wrong:
            raise ValueError(
                f"{folder} was started with {', '.join(wrong)}: leave that out, or start another run with --out"
            )
        recipe = self.recipe if given["epochs"] is None else replace(self.recipe, epochs=given["epochs"])
        kept = {name: self.flags.get(name) if value in (None, False) else value for name, value in given.items()}
        return replace(self, recipe=recipe, flags=kept)


def argument(name: str, value: Any) -> str:
    """As it stands on the command line."""
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value is None else f"{flag} {value}"

"""What belongs to a module that `import fastalex` must not bring in: done when somebody else imports that module."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, then: Callable[[ModuleType], object]) -> None:
    """Calls `then` with the module `name` once it is there: now, or at the end of its import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: Callable[[ModuleType], object]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: importlib.abc.Loader = spec.loader
            execute = loader.exec_module

            def and_then(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            loader.exec_module = and_then  # type: ignore[method-assign]
        return spec

"""The operations on a CPU, one file per operation; the operators in `fastalex.ops` check arguments.

LRN and pooling are loops that numba compiles (`fastalex.cpu.loops`); where it is missing, their formulas in plain
PyTorch (`fastalex.cpu.formulas`).  PyTorch's own operations do the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType


@cache
def compiled_loops() -> ModuleType | None:
    """`fastalex.cpu.loops`, or None where numba cannot compile it; the reason is logged, once."""
    try:
        if importlib.util.find_spec("numba") is None:
            raise ImportError("numba is not installed")
        module = importlib.import_module("fastalex.cpu.loops")
        if module.numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
        return module
    # numba refuses a numpy that is newer than itself, and a cache that it can write nowhere
    except (ImportError, RuntimeError) as error:
        logging.getLogger("fastalex").warning(
            "LRN and pooling run as formulas in plain PyTorch, slowly: %s; "
            "pip install 'fastalex[cpu]' brings compiled loops",
            error,
        )
        return None

"""The operations on a CPU, one file per operation; the operators in `fastalex.ops` check arguments.

Plain PyTorch does all of it.  Where numba is installed, its loops (`fastalex.cpu.compiled`) do LRN and pooling of
float32 and bfloat16 in channels_last.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType

from torch import Tensor


def compiled_for(x: Tensor, *others: Tensor) -> ModuleType | None:
    """`fastalex.cpu.compiled` if it can be imported and takes tensors as these."""
    module = _compiled()
    return module if module is not None and module.takes(x, *others) else None


@cache
def _compiled() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("fastalex.cpu.compiled")
    # numba refuses a numpy that is newer than itself, and a cache that it can write nowhere
    except (ImportError, RuntimeError) as error:
        logging.getLogger("fastalex").warning("the CPU kernels do without numba: %s", error)
        return None

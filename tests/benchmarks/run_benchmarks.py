"""pytest in a process of its own, with the suites' conftest: on a CPU, or on the stand-in for a CUDA device."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_benchmarks(folder, *arguments, script=None, target=ROOT / "benchmarks" / "test_lrn.py", cuda=""):
    """Run a suite of the test's own, given as text, or the `target`.

    cuda: what every process does before anything else, with `stand_in_cuda` imported: one of its lines makes a device.
    """
    if script is not None:
        target = folder / "test_small.py"
        target.write_text(script)
        (folder / "conftest.py").write_text("from benchmarks.conftest import *\n")
    if cuda:
        (folder / "sitecustomize.py").write_text(f"import stand_in_cuda\n{cuda}\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, Path(__file__).parent))),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "--rootdir", str(target.parent), str(target),
         *arguments],
        env=environment, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip

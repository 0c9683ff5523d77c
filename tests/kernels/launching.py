"""Launch the catalogue's kernels without a GPU: by Triton's own driver and launcher, on the libcuda of cuda_rules.c.

In processes of their own: this one may be the interpreter's.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def launched(cases, processes=2):
    """{"name batch": {"recorded", "launched", "descriptors"} or {"error"}} for (entry of the catalogue, batch)."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}

    def serve(part):
        run = subprocess.run(
            [sys.executable, __file__], input=json.dumps(part), env=environment, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(run.stderr[-4000:])
        return json.loads(run.stdout)

    cases = sorted(cases, key=lambda case: "lrn_max_pool/backward" in case[0] or "lrn_max_pool" not in case[0])
    parts = [cases[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        return {key: answer for answers in pool.map(serve, parts) for key, answer in answers.items()}


def build(folder, name="libcuda.so.1"):
    """Compile the library into the folder, with the cuda.h that Triton ships; returns it, loaded for all to see."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_name("cuda_rules.c"), Path(folder) / name
    options = ["-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{name}"]
    subprocess.run(["gcc", *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def install(folder):
    """Make Triton launch on an H100 that is not there; returns the library."""
    library = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    import triton
    from triton.backends.nvidia import driver as nvidia

    driver = object.__new__(nvidia.CudaDriver)
    driver.utils, driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    driver.get_device_capability = lambda device=None: (9, 0)
    driver.get_current_device = driver.get_current_stream = lambda device=None: 0
    triton.runtime.driver.set_active(driver)
    return library


def launch(name, batch, library):
    from fastalex.inspection import catalog

    before = library.rules_launches(), library.rules_descriptors()
    try:
        recorded = catalog.launches(catalog.ENTRIES[name], batch)
        for one in recorded:
            one.kernel[one.grid](*one.args, **one.constants)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "recorded": len(recorded),
        "launched": library.rules_launches() - before[0],
        "descriptors": library.rules_descriptors() - before[1],
    }


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        library = install(folder)
        found = {f"{name} {batch}": launch(name, batch, library) for name, batch in json.load(sys.stdin)}
    json.dump(found, answers)

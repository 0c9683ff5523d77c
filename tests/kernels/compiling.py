"""Compile kernels for a GPU that need not be there, in one process of its own: this one may be the interpreter's."""

import json
import os
import subprocess
import sys


def compiled(jobs):
    """{name: {"ttir", "ptx" or "amdgcn", "shared"}} for jobs {name: (module, kernel, types, constants, target)}.

    types: {argument: Triton type} without the constants; target: a CUDA capability (90) or an AMD name ("gfx942").
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:])
    return json.loads(run.stdout)


def compile_one(module, kernel, types, constants, target):
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"fastalex.kernels.{module}"), kernel)
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # as at a launch: the allocator aligns tensors to 16 bytes
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    # JSON has no tuples
    constants = {name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    built = triton.compile(source, target=gpu, options={"num_warps": 128 // gpu.warp_size})
    text = {name: built.asm[name] for name in ("ttir", "ptx", "amdgcn") if name in built.asm}
    return {**text, "shared": built.metadata.shared}


if __name__ == "__main__":
    json.dump({name: compile_one(*job) for name, job in json.load(sys.stdin).items()}, sys.stdout)

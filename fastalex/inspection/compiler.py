"""What the compiler makes of the catalogue's kernels, for GPUs that need not be there.

    results([("paper/conv1/lrn_max_pool/forward/fp16/channels_last", "sm_90")])

Every launch is compiled as at a launch, through Triton's own `run`, with a driver that only names the target, and its
machine code is read: registers, spills, shared memory, widths of global accesses, instructions per element.  Compilers
run in processes of their own: one that crashes costs its own entry.  Results are cached per user, keyed by entry and
target, the modules that the entry's operation imports, and the versions of Triton and PyTorch.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import triton

from fastalex import kernels

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


# ------------------------------------------------------------------------------------------------- in the worker
class NamedTarget:
    """A driver for compiling only: says which GPU the code is for."""

    def __init__(self, target):
        from triton.backends.compiler import GPUTarget

        number = target.removeprefix("sm_")
        self.target = GPUTarget("cuda", int(number), 32) if number != target else GPUTarget("hip", target, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # kernels keep what they compiled by device
        return str(self.target)

    def get_current_stream(self, device):
        return 0


def instructions(sass):
    """(address, opcode with its suffixes, text, whether it has a condition) of each instruction but the padding."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?((\S+).*?);", sass, re.MULTILINE)
    return [(int(address, 16), opcode, text, bool(guard)) for address, guard, text, opcode in lines if opcode != "NOP"]


def branches(code):
    """(address, target, whether it has a condition) of each branch, but the trap behind the end."""
    found = []
    for address, opcode, text, condition in code:
        target = re.search(r"0x([0-9a-f]+)", text) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) != address:
            found.append((address, int(target[1], 16), condition))
    return found


def trips(launch):
    """How often a thread of this launch runs through the loop of its kernel, None if that is not known.

    Not known: sum_partials_kernel, whose loop the compiler unrolls.  It is a hundredth of its predecessor's work.
    """
    counters = {
        "augment_kernel": "PROGRAM_STEPS",
        "lrn_max_pool_fwd_kernel": "rows",
        "lrn_max_pool_bwd_kernel": "ROWS",
        "max_pool_bwd_3x3s2_kernel": "per_program",
        "relu_bias_grad_kernel": "steps",
        "relu_bias_grad_nchw_kernel": "steps",
    }
    if launch.name == "lpips_bwd_kernel":
        # the windows that cover a pixel, on average
        side, stride = launch.argument("WINDOW")
        return (side / stride) ** 2
    if launch.name == "sgd_kernel":
        # for tensors at odd addresses, and the ends of the others
        return 0
    return launch.argument(counters[launch.name]) if launch.name in counters else None


# The pipe that executes an instruction, by the first part of its opcode; what is not here goes to the ALU, and what
# begins with U to the uniform datapath.
PIPES = {
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 IMAD",
    "xu": "MUFU F2F F2I I2F FRND POPC",
    "lsu": "LD LDC LDG LDGSTS LDL LDS LDSM LDTM ST STG STL STS STSM STTM ATOM ATOMG ATOMS RED SHFL",
    "tensor": "DMMA HGMMA HMMA IGMMA IMMA QGMMA QMMA UTCHMMA UTCIMMA UTCQMMA",
    "control": (
        "BAR BRA BRX BREAK BSSY BSYNC CALL DEPBAR EXIT FENCE JMP LDGDEPBAR MEMBAR NANOSLEEP RET SYNCS WARPGROUP "
        "WARPSYNC YIELD"
    ),
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


def pipe(opcode):
    first = opcode.split(".")[0]
    return PIPE_OF.get(first) or ("uniform" if first.startswith("U") else "alu")


def issued(code, count):
    """How often a thread issues each opcode, those of the loop `count` times; None if that is needed and not known.

    A conditional branch forward over code without a loop is taken: what lies behind it is a rare case (max-pool's
    repair of infinities and NaN).
    """
    jumps = branches(code)
    loops = [(target, address) for address, target, _ in jumps if target < address]
    if loops and count is None:
        return None
    rare = [
        (address, target)
        for address, target, condition in jumps
        if target > address and condition and not any(address < first < target for first, _ in loops)
    ]
    total: Counter[str] = Counter()
    for address, opcode, *_ in code:
        if not any(start < address < stop for start, stop in rare):
            total[opcode] += count if any(first <= address <= last for first, last in loops) else 1
    return total


def main_loop(code, products):
    """(instructions, how many of them are `products`) of the shortest loop that has such opcodes, None without."""
    loops = []
    for address, target, _ in branches(code):
        body = [opcode for first, opcode, *_ in code if target <= first <= address]
        found = sum(opcode in products for opcode in body)
        if found:
            loops.append((len(body), found))
    return min(loops, default=None)


def access_bytes(opcode):
    """Bytes that one thread moves by a load or store with this opcode."""
    width = re.search(r"\.(?:U|S)?(8|16|64|128)(?:\.|$)", opcode)
    return int(width[1]) // 8 if width else 4


def is_spill(opcode, text):
    """Whether a value goes to local memory or comes back.

    A stored zero does not: for sm_120, CUDA 12.9 puts one on the stack for a call that it places before each copy by a
    descriptor, for memory of another block, and jumps over.
    """
    return opcode.startswith("LDL") or (opcode.startswith("STL") and not re.search(r"\], RZ\b", text))


def read_cubin(cubin):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    return instructions(sass), usage


def number_after(label, text):
    found = re.search(rf"{re.escape(label)}\s*(\d+)", text)
    if found is None:
        raise ValueError(f"no {label!r} in the compiler's report")
    return int(found[1])


def measured_cubin(built, launch, elements):
    code, usage = read_cubin(built.asm["cubin"])
    thread = issued(code, trips(launch))
    threads = launch.programs * launch.constants["num_warps"] * 32
    pipes: Counter[str] = Counter()
    for opcode, number in (thread or {}).items():
        pipes[pipe(opcode)] += number * threads / elements
    opcodes = Counter(opcode for _, opcode, *_ in code)
    widths: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter(), "copies": Counter()}
    for opcode, number in opcodes.items():
        kind = {"LDG": "loads", "STG": "stores", "LDGSTS": "copies"}.get(opcode.split(".")[0])
        if kind:
            widths[kind][access_bytes(opcode)] += number
    products = {opcode: number for opcode, number in opcodes.items() if pipe(opcode) == "tensor"}
    if not products and "tt.dot" in built.asm["ttir"]:
        products = {"FFMA": opcodes["FFMA"]}
    return {
        "registers": number_after("REG:", usage),
        "stack": number_after("STACK:", usage),
        "spills": sum(is_spill(opcode, text) for _, opcode, text, _ in code),
        **widths,
        # TMA: tiles that descriptors copy
        "tiles": sum(number for opcode, number in opcodes.items() if opcode.startswith(("UTMALDG", "UTMASTG"))),
        "products": products,
        "main_loop": main_loop(code, products),
        "instructions": None if thread is None else thread.total() * threads / elements,
        "pipes": pipes,
    }


def measured_amdgcn(built):
    text = built.asm["amdgcn"]

    def field(name):
        return number_after(f".{name}:", text)

    widths: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
    sizes = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
    for kind, size, number in re.findall(r"(?:global|buffer)_(load|store)_([a-z]+?)(?:_d16\w*|x(\d))?\s", text):
        widths[f"{kind}s"][sizes[size] * int(number or 1)] += 1
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        **widths,
        "copies": {},
        "tiles": 0,
        "products": Counter(re.findall(r"\bv_mfma_\w+", text)),
        "main_loop": None,
        "instructions": None,
        "pipes": {},
    }


def compile_entry(name, target):
    """What each launch of an entry compiles to."""
    from fastalex.inspection import catalog

    entry = catalog.ENTRIES[name]
    triton.runtime.driver.set_active(NamedTarget(target))
    out = []
    for launch in catalog.launches(entry):
        start = time.perf_counter()
        built = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants)
        seconds = time.perf_counter() - start
        elements = entry.image_elements * entry.batch
        code = measured_cubin(built, launch, elements) if "cubin" in built.asm else measured_amdgcn(built)
        out.append(
            {
                "kernel": launch.name,
                "programs": launch.programs,
                "warps": built.metadata.num_warps,
                "shared": built.metadata.shared,
                # columns of 128 x 4 bytes, of which sm_100 has 512 per multiprocessor
                "tensor_memory": getattr(built.metadata, "tmem_size", 0) or 0,
                # the compiler's answer to more tensor memory than there is
                "trap": "llvm.trap" in built.asm["llir"],
                **code,
                "seconds": round(seconds, 1),
            }
        )
    return out


def work():
    """Answer requests, one JSON line each, until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            name, target = json.loads(line)
            if target == "traffic":
                from fastalex.inspection import traffic

                answer = traffic.count(name)
            else:
                answer = compile_entry(name, target)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------- in the caller
WORKER = """
import sys
import torch
if sys.argv[1] == "gfx942":
    torch.version.hip = "offline"  # launchers choose for AMD by it
from fastalex.inspection import compiler
compiler.work()
"""


class Worker:
    """A process that compiles for one kind of target."""

    def __init__(self, kind):
        self.kind = kind
        self.directory = tempfile.TemporaryDirectory()
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1" if kind == "traffic" else "0",
            # empty: compile times are those of a compilation
            "TRITON_CACHE_DIR": self.directory.name,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path]),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, kind],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def ask(self, request):
        """The answer, or None if the process died over it."""
        try:
            self.requests.write(json.dumps(request) + "\n")
            self.requests.flush()
            return json.loads(self.answers.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return None

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.process.terminate()
        self.process.wait()
        self.answers.close()
        self.directory.cleanup()


def kind_of(target):
    return target if target in ("gfx942", "traffic") else "nvidia"


# the modules of the operations that are none themselves
MODULES = {
    "lrn_max_pool": ["lrn_max_pool", "lrn_max_pool_backward"],
    "conv_relu": ["convolution.forward"],
    "conv_backward": ["convolution.input_grad", "convolution.weight_grad"],
}


def text_of(module):
    """The source of a module of the kernels' folder, as "convolution.forward"."""
    return Path(kernels.__path__[0], *module.split(".")).with_suffix(".py").read_text()


@functools.cache
def imported(module):
    """The kernels' modules that one of them imports, itself and the imports of imports included."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            package, _, _ = name.rpartition(".")
            for dots, inner, names in re.findall(r"^from (\.+)(\w*) import (.+)$", text_of(name), re.MULTILINE):
                inside = f"{package}." if package and dots == "." else ""
                waiting += [inside + one for one in ([inner] if inner else names.split(", "))]
    return found


def sources(name, target):
    """What the result of (entry, target) depends on, as text: kernels, and what launches and reads them."""
    from fastalex.inspection import catalog

    entry = catalog.ENTRIES.get(name)
    if entry is None:
        return ""
    # what a fused backward pass launches after its own kernel is in relu_bias_grad
    operations = [*MODULES.get(entry.operation, [entry.operation]), "relu_bias_grad"]
    modules = set().union(*map(imported, operations))
    readers = ["compiler.py", "catalog.py", *(["traffic.py", "interpreter.py"] if target == "traffic" else [])]
    texts = [Path(__file__).with_name(name).read_text() for name in readers]
    return "".join([*texts, *map(text_of, sorted(modules))])


def cache_file(name, target):
    """Where the result of (entry, target) lies, by everything that it depends on."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastalex" / "kernels"
    key = hashlib.sha256(f"{triton.__version__} {torch.__version__} {name} {target}".encode())
    key.update(sources(name, target).encode())
    return root / f"{key.hexdigest()}.json"


def write_atomically(path, text):
    """Another process may write the same result at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# Processor seconds of one request on an AMD EPYC, roughly: 0.5 to 4 were measured; and of a process before its first.
SECONDS = {"nvidia": 1.5, "gfx942": 1.5, "traffic": 1.0}
START_SECONDS = 3.0
# Of a process that compiles, with PyTorch and Triton in it.
MEMORY = 1 << 30


def enough_processes():
    """One per core that this process may use, as far as the machine's memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY))


def uncached(requests):
    """Those of the requests whose results are not in the cache."""
    return [request for request in sorted(set(requests)) if not cache_file(*request).exists()]


def expected_seconds(requests):
    """What `results` takes for requests of which none is cached, on an idle machine, roughly."""
    work = sum(SECONDS[kind_of(target)] for _, target in requests)
    return START_SECONDS + work / min(enough_processes(), len(requests) or 1)


def results(requests, processes=None, done=None):
    """{(entry name, target): [one dict per launch]} for pairs of them; target "traffic" counts DRAM bytes instead.

    processes: by default one per core.  done: called, in any thread, after each request that was not in the cache.
    An entry that does not compile maps to {"error": why}.  Only results without an error are kept in the cache.
    """
    found = {}
    # a process serves one kind of request: they are as many lists, the longest work, the fused forward's, first in each
    waiting: dict[str, list[tuple[tuple[str, str], Path]]] = {}
    for request in sorted(set(requests), key=lambda request: "lrn_max_pool/forward" not in request[0]):
        path = cache_file(*request)
        if path.exists():
            found[request] = json.loads(path.read_text())
        else:
            waiting.setdefault(kind_of(request[1]), []).append((request, path))
    kinds = list(waiting)
    lock = threading.Lock()

    def take(kind):
        """A request of this kind while there is one, else of the kind of which most are left; None at the end."""
        with lock:
            kind = kind if waiting[kind] else max(kinds, key=lambda kind: len(waiting[kind]))
            return waiting[kind].pop(0) if waiting[kind] else None

    def serve(kind):
        worker = None
        while (taken := take(kind)) is not None:
            request, path = taken
            kind = kind_of(request[1])
            if worker is None or worker.kind != kind:
                if worker is not None:
                    worker.close()
                worker = Worker(kind)
            answer = worker.ask(request)
            if answer is None:
                answer = {"error": f"the compiler's process ended with code {worker.process.wait()}"}
                worker.close()
                worker = None
            found[request] = answer
            if "error" not in answer:
                write_atomically(path, json.dumps(answer))
            if done is not None:
                done()
        if worker is not None:
            worker.close()

    number = min(processes or enough_processes(), sum(len(left) for left in waiting.values()))
    threads = [threading.Thread(target=serve, args=(kinds[i % len(kinds)],)) for i in range(number)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C: nothing more is begun
        with lock:
            for left in waiting.values():
                left.clear()
        raise
    return found

"""`pytest tests/kernels --device cuda`: the tests as they are, their kernels on the GPU.

The tests hand CPU tensors to the launchers.  Each launch gets copies of them on the device, and their memory comes back
when it is done.  Every copy lies between borders: a kernel that writes outside of a tensor fails its test by name, and
one that reads there gets numbers that show.  `--device cpu` does the same in Triton's interpreter.

After an illegal access nothing in a process can use the GPU any more.  Without pytest-xdist the run then ends, with the
names of kernel and test; with it (`-n 8`) the test has failed, and a new process goes on with the others.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

# as they were: tests poison what torch.empty returns
FULL = torch.full
# Bytes on either side of a tensor; also its alignment, as that of PyTorch's allocator.
BORDER = 1 << 16
# In fp16 a NaN, in bf16 and fp32 about -4e37; and nothing that a kernel writes.
CANARY = 0xFD
EXIT_CODE = 77
# Seconds for one launch, compiled: the tests' tensors are small.
PATIENCE = 60


class Copies:
    """Tensors of one launch on the device; those that share memory share it there."""

    def __init__(self, device):
        self.device = device
        self.memory = {}

    def of(self, value):
        """A copy of a tensor on the CPU, or a descriptor of one; anything else as it is."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        if isinstance(value, TensorDescriptor):
            return dataclasses.replace(value, base=self.of(value.base))
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.memory:
            original = torch.tensor((), dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            padded = -(-storage.nbytes() // BORDER) * BORDER
            framed = FULL((BORDER + padded + BORDER,), CANARY, dtype=torch.uint8)
            framed[BORDER : BORDER + storage.nbytes()] = original
            self.memory[storage.data_ptr()] = original, framed.to(self.device)
        _, framed = self.memory[storage.data_ptr()]
        first = BORDER // value.element_size() + value.storage_offset()
        return framed.view(value.dtype).as_strided(value.shape, value.stride(), first)

    def bring_back(self, kernel):
        """Raises AssertionError where the kernel wrote outside of a tensor."""
        for original, framed in self.memory.values():
            found = framed.cpu()
            end = BORDER + original.numel()
            for border, where in ((found[:BORDER], "before the start"), (found[end:], "behind the end")):
                wrong = (border != CANARY).nonzero()
                if len(wrong):
                    nearest = BORDER - int(wrong[-1]) if where == "before the start" else int(wrong[0]) + 1
                    raise AssertionError(
                        f"{kernel} wrote {len(wrong)} bytes {where} of a tensor of {original.numel()} bytes, "
                        f"{nearest} from it and further"
                    )
            original.copy_(found[BORDER:end])


def synchronize(device):
    """Wait for the launch.  Raises RuntimeError for its error, and where it does not end."""
    if device == "cuda":
        done = torch.cuda.Event()
        done.record()
        give_up_at = time.monotonic() + PATIENCE
        while not done.query():
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"it has not ended after {PATIENCE} s")
            time.sleep(2e-5)


class OnDevice:
    """The plugin behind --device.  `lost`: a folder where processes that die leave the reason, for pytest-xdist."""

    def __init__(self, device, lost):
        self.device = device
        self.lost = lost
        self.launches = Counter()
        self.broken = False

    def launching(self, run):
        """A kernel's method `run`, on copies of the tensors."""

        @functools.wraps(run)
        def launch(kernel, *args, grid, warmup=False, **named):
            if warmup:
                return run(kernel, *args, grid=grid, warmup=True, **named)
            copies = Copies(self.device)
            args = [copies.of(value) for value in args]
            named = {name: copies.of(value) for name, value in named.items()}
            result = run(kernel, *args, grid=grid, warmup=False, **named)
            try:
                synchronize(self.device)
            except RuntimeError as error:
                self.give_up(kernel.__name__, error)
            copies.bring_back(kernel.__name__)
            self.launches[kernel.__name__] += 1
            return result

        return launch

    def give_up(self, kernel, error):
        """End the process, whose context is broken."""
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        reason = f"{kernel} broke the context of the GPU in {test}: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            self.broken = True
            pytest.exit(reason, returncode=EXIT_CODE)
        (self.lost / os.environ["PYTEST_XDIST_WORKER"]).write_text(reason)
        os._exit(EXIT_CODE)

    def pytest_unconfigure(self):
        if self.broken:
            # the orderly end of a process waits for its kernels
            sys.stdout.flush()
            os._exit(EXIT_CODE)

    def pytest_report_header(self):
        name = torch.cuda.get_device_name() if self.device == "cuda" else "Triton's interpreter"
        return f"kernels: on {name}, tensors between borders of {BORDER} bytes"

    def pytest_terminal_summary(self, terminalreporter):
        counts = ", ".join(f"{kernel} {count}" for kernel, count in sorted(self.launches.items()))
        terminalreporter.write_line(f"launches on {self.device}: {counts or 'none'}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, report):
        reason = self.lost / report.node.gateway.id
        if reason.exists():
            report.longrepr = reason.read_text()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["lost"] = str(self.lost)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launches"] = dict(self.launches)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        # a process that died has no output
        self.launches.update(getattr(node, "workeroutput", {}).get("launches", {}))


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cuda", "cpu"],
        help="tests/kernels: launch on copies of the tensors, between borders, on this device",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    device = config.getoption("device")
    if device is None:
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no GPU here")
    if config.getoption("dist", "no") in ("loadfile", "loadscope", "loadgroup"):
        # with groups of tests, pytest-xdist 3.8 runs the test again that ended a process, and may wait for ever
        config.option.dist = "worksteal"
    # read when a kernel is decorated
    os.environ["TRITON_INTERPRET"] = "0" if device == "cuda" else "1"
    if device == "cuda":
        from triton.runtime.jit import JITFunction as Kernel
    else:
        from triton.runtime.interpreter import InterpretedFunction as Kernel

    if hasattr(config, "workerinput"):
        lost = Path(config.workerinput["lost"])
    else:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        lost = Path(folder.name)
    plugin = OnDevice(device, lost)
    config.pluginmanager.register(plugin)
    run = Kernel.run
    Kernel.run = plugin.launching(run)
    config.add_cleanup(lambda: setattr(Kernel, "run", run))

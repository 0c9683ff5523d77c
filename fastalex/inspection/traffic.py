"""DRAM traffic of the catalogue's launches, counted in Triton's interpreter on one image.

What is counted is the set of 32-byte sectors that a launch reads, and the set that it writes: the traffic of a GPU
whose cache never loses a line within one launch and keeps none between launches.  Real traffic is higher where
programs that share a line run far apart.  Images have the layer's full size; matrices of features the full batch.
"""

import contextlib
import itertools
from dataclasses import replace

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder
from triton.runtime.jit import KernelInterface

from fastalex.inspection import catalog, interpreter
from fastalex.kernels import lrn, lrn_max_pool, lrn_max_pool_backward, max_pool_3x3s2, relu_bias_grad

SECTOR = 32


class Sectors:
    """A growing set of sector numbers."""

    def __init__(self):
        self.blocks = []
        self.pending = 0

    def add(self, pointers, mask):
        addresses = np.asarray(pointers.data).ravel()
        # the interpreter's masks are bool or integers
        touched = addresses[np.broadcast_to(np.asarray(mask.data).ravel().astype(bool), addresses.shape)]
        self.blocks.append(np.unique(touched // SECTOR))
        self.pending += self.blocks[-1].size
        if self.pending > 1 << 20:
            self.blocks = [np.unique(np.concatenate(self.blocks))]
            self.pending = 0

    def bytes(self):
        return int(np.unique(np.concatenate(self.blocks)).size) * SECTOR if self.blocks else 0


@contextlib.contextmanager
def counting():
    """The launches in the block run; the list that it gets receives (kernel, bytes read, bytes written) of each."""
    interpreter.mend()
    counted = []
    current: list = []
    getitem, load, store = (
        KernelInterface.__getitem__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def counted_getitem(kernel, grid):
        def launch(*args, **constants):
            current[:] = Sectors(), Sectors()
            getitem(kernel, grid)(*args, **constants)
            counted.append((kernel.__name__, *(sectors.bytes() for sectors in current)))

        return launch

    def counted_load(self, pointers, mask, *rest, **named):
        current[0].add(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        current[1].add(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    KernelInterface.__getitem__ = counted_getitem
    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield counted
    finally:
        KernelInterface.__getitem__ = getitem
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


@contextlib.contextmanager
def cut_as_in_a_batch():
    """One image is cut into programs as an image of catalog.BATCH is: partial sums are then as many, per image."""
    thresholds = [
        (lrn_max_pool, "ENOUGH_WARPS"),
        (lrn_max_pool_backward, "ENOUGH_WARPS"),
        (max_pool_3x3s2, "MANY_PROGRAMS"),
        (relu_bias_grad, "MAX_PARTIALS"),
    ]
    originals = [getattr(module, name) for module, name in thresholds]
    passes = {name: getattr(lrn, name) for name in ("FORWARD", "BACKWARD")}
    configs = [
        (module, name, getattr(module, name))
        for module, name in ((lrn_max_pool, "forward_config"), (lrn_max_pool_backward, "backward_config"))
    ]
    try:
        for module, name in thresholds:
            setattr(module, name, max(1, getattr(module, name) // catalog.BATCH))
        for module, name, config in configs:
            config.cache_clear()
            # the interpreter takes as long for a program of 32 warps as for one of a single warp
            setattr(module, name, lambda *cut, config=config: replace(config(*cut), warps=32))
        for name, one in passes.items():
            setattr(lrn, name, replace(one, threads=32 * one.threads, vectors=32 * one.vectors))
        yield
    finally:
        for name, one in passes.items():
            setattr(lrn, name, one)
        for (module, name), original in zip(thresholds, originals, strict=True):
            setattr(module, name, original)
        for module, name, config in configs:
            config.cache_clear()
            setattr(module, name, config)


def sectors(elements, size):
    """Bytes of whole sectors that so many elements of `size` bytes fill."""
    return -(-elements * size // SECTOR) * SECTOR


def count_convolution(entry):
    """Bytes of each launch of a convolution: each tensor once.

    Not counted in the interpreter, where a layer of full size takes minutes.  A test counts small ones: all
    algorithms read and write every sector of their tensors.
    """
    x, weight, bias = entry.tensors()
    y = entry.image_elements * entry.batch
    size = x.element_size()
    read = sum(sectors(tensor.numel(), size) for tensor in (x, weight))
    found = [launch for launch in catalog.launches(entry)]
    bytes_of = [(read, sectors(y, size))]
    if len(found) == 2:
        parts = sectors(found[1].argument("count") * y, 4)
        bytes_of = [(read, parts), (parts, sectors(y, size))]
    # the bias goes into what is stored at last
    bytes_of[-1] = bytes_of[-1][0] + sectors(bias.numel(), size), bytes_of[-1][1]
    return [
        {"kernel": launch.name, "read": read / y, "written": written / y}
        for launch, (read, written) in zip(found, bytes_of, strict=True)
    ]


def count_gradient(entry):
    """Bytes of each launch of a convolution's gradient, counted as in `count_convolution`."""
    x, weight, _ = entry.tensors()
    y = entry.image_elements * entry.batch
    size = x.element_size()
    x_bytes, weight_bytes, y_bytes = (sectors(count, size) for count in (x.numel(), weight.numel(), y))
    found = list(catalog.launches(entry))
    if entry.grad == "input_grad":
        # y of the mask is as large as dx; the partial sums are summed by the launches behind it
        rows = [4 * entry.channels * launch.argument("count") for launch in found[1:]] + [4 * entry.channels]
        moved = [(y_bytes + weight_bytes + x_bytes, x_bytes + rows[0]), *itertools.pairwise(rows)]
    elif len(found) == 1:
        moved = [(y_bytes + x_bytes, weight_bytes)]
    else:
        parts = found[1].argument("count") * weight.numel() * 4
        moved = [(y_bytes + x_bytes, parts), (parts, weight_bytes)]
    return [
        {"kernel": launch.name, "read": read / y, "written": written / y}
        for launch, (read, written) in zip(found, moved, strict=True)
    ]


def count(name):
    """DRAM bytes that each launch of an entry reads and writes, per element of the entry's largest tensor."""
    entry = catalog.ENTRIES[name]
    if isinstance(entry, catalog.ConvGradEntry):
        return count_gradient(entry)
    if isinstance(entry, catalog.ConvEntry):
        return count_convolution(entry)
    image = entry.side > 1
    batch = 1 if image else catalog.BATCH
    if isinstance(entry, catalog.SgdEntry):
        # of which every block of parameters has its own bytes: conv2's are counted
        entry, batch = replace(entry, prefix="features.3."), 1
    with counting() as counted, cut_as_in_a_batch() if image else contextlib.nullcontext():
        entry.call(batch, device="cpu")
    elements = entry.image_elements * batch
    return [
        {"kernel": kernel, "read": read / elements, "written": written / elements} for kernel, read, written in counted
    ]

"""Momentum SGD of all parameters in one launch, with weights that lie in two halves.

    g = gradient / grad_scale                    negated to maximize
    g = (g + weight_decay * w) * factor
    m = momentum * m + (1 - dampening) * g       m = g in the first step
    w = w - lr * m                               w - lr * (g + momentum * m) with Nesterov

As torch.optim.SGD with fused=True computes it on a GPU, bit for bit: every operation in fp64, every result in fp32.

An fp32 weight in two halves is a bf16 number, the nearest (ties away from zero), and 16 bits, what is missing:

    w as 32 bits = high * 2^16 + low,    -2^15 <= low < 2^15

`high` is the model's parameter, which forward and backward use as it is; `low` is known to the optimizer alone (split
SGD: Kalamkar et al., arXiv:2005.04680, who cut where this rounds).  A weight has 18 bytes per step: gradient 2, high 4,
low 4, momentum 8.  With a bf16 copy beside an fp32 weight it would be 20, and with PyTorch's automatic mixed precision
32: 20 of the update, 6 to cast the weight, 6 to cast the gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .geometry import is_packed, lies_like, refuse_shared_memory
from .registers import DTYPES, warps

# Of a program: two vectors of four elements for each of its 256 threads, all loads of which are in flight at once.
# Vectors of eight would be 16 bytes of bf16, but 32 of fp32, which a warp loads and stores in two strided accesses.
BLOCK = 2048
THREADS = 256
VEC = 4
# What a row of the table holds.
COLUMNS = ("first program", "elements", "weight", "low", "momentum", "gradient")


@triton.jit
def join_halves(high, low):
    """fp32 from the bits of a bf16 number and the lower half.

    Somebody may have written another number: infinity, NaN and zero, with which an old lower half would make something
    else, are taken as they are.
    """
    alone = ((high & 0x7F80) == 0x7F80) | (((high & 0x7FFF) == 0) & (low < 0))
    bits = (high.to(tl.int32) << 16) + tl.where(alone, 0, low.to(tl.int32))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split_halves(w):
    """(bits of the nearest bf16 number, lower half) of fp32: adding half of the last place rounds the magnitude."""
    bits = w.to(tl.uint32, bitcast=True)
    # a NaN whose upper half is that of infinity, or wraps, would be lost
    high = tl.where(w != w, (bits >> 16) | 0x0040, (bits + 0x8000) >> 16)
    return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)


@triton.jit
def update(
    weight_ptr, low_ptr, momentum_ptr, grad_ptr, i, end,
    momentum, undamped, decay, lr, factor, grad_scale,
    SPLIT: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The elements i of one tensor."""
    mask = i < end if MASKED else None
    if SPLIT:
        w = join_halves(tl.load(weight_ptr + i, mask=mask), tl.load(low_ptr + i, mask=mask))
    else:
        w = tl.load(weight_ptr + i, mask=mask)
    g = tl.load(grad_ptr + i, mask=mask).to(tl.float32)
    if MOMENTUM and not FIRST:
        m = tl.load(momentum_ptr + i, mask=mask)
    w = w.to(tl.float64)
    if grad_scale is not None:
        g = (g.to(tl.float64) / grad_scale.to(tl.float64)).to(tl.float32)
        tl.store(grad_ptr + i, g.to(grad_ptr.dtype.element_ty), mask=mask)
    if MAXIMIZE:
        g = -g
    if DECAY:
        g = (g.to(tl.float64) + decay * w).to(tl.float32)
    if factor is not None:
        g *= factor
    step = g.to(tl.float64)
    if MOMENTUM:
        if not FIRST:
            step = momentum * m.to(tl.float64) + undamped * step
        m = step.to(tl.float32)
        tl.store(momentum_ptr + i, m, mask=mask)
        step = (g.to(tl.float64) + momentum * step).to(tl.float32).to(tl.float64) if NESTEROV else m.to(tl.float64)
    w = (w - lr * step).to(tl.float32)
    if SPLIT:
        high, low = split_halves(w)
        tl.store(weight_ptr + i, high, mask=mask)
        tl.store(low_ptr + i, low, mask=mask)
    else:
        tl.store(weight_ptr + i, w, mask=mask)


@triton.jit
def sgd_kernel(
    tensor_ptr,  # programs, int32: the tensor of each
    table_ptr,  # tensors x COLUMNS, int64: its first program, its elements, and addresses
    numbers_ptr,  # fp64: momentum, 1 - dampening, weight decay
    lr_ptr,  # one number
    factors_ptr,  # tensors, fp32; or None
    grad_scale_ptr,  # one fp32, or None; then the gradients are divided in memory, too
    found_inf_ptr,  # one fp32: 1 for no update; or None
    GRAD: tl.constexpr,
    SPLIT: tl.constexpr,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A program updates BLOCK elements of one tensor: in vectors, unless its end or its address is odd."""
    if found_inf_ptr is not None:  # noqa: SIM102, Triton's `and` reads both sides
        if tl.load(found_inf_ptr) == 1.0:
            return
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    row = table_ptr + tensor * WIDTH
    start = (tl.program_id(0) - tl.load(row)) * BLOCK
    end = tl.load(row + 1)
    weight = tl.load(row + 2)
    low = tl.load(row + 3)
    buffer = tl.load(row + 4)
    grad = tl.load(row + 5)

    momentum = tl.load(numbers_ptr)
    undamped = tl.load(numbers_ptr + 1)
    decay = tl.load(numbers_ptr + 2)
    lr = tl.load(lr_ptr).to(tl.float64)
    factor = tl.load(factors_ptr + tensor) if factors_ptr is not None else None
    grad_scale = tl.load(grad_scale_ptr) if grad_scale_ptr is not None else None

    if (start + BLOCK > end) | (((weight | low | buffer | grad) & 15) != 0):
        for piece in range(0, tl.minimum(end - start, BLOCK), PIECE):
            update(
                weight.to(tl.pointer_type(tl.int16 if SPLIT else tl.float32)),
                low.to(tl.pointer_type(tl.int16)),
                buffer.to(tl.pointer_type(tl.float32)),
                grad.to(tl.pointer_type(GRAD)),
                start + piece + tl.arange(0, PIECE), end, momentum, undamped, decay, lr, factor, grad_scale,
                SPLIT, DECAY, MOMENTUM, FIRST, NESTEROV, MAXIMIZE, MASKED=True,
            )  # fmt: skip
    else:
        update(
            tl.multiple_of(weight.to(tl.pointer_type(tl.int16 if SPLIT else tl.float32)), 16),
            tl.multiple_of(low.to(tl.pointer_type(tl.int16)), 16),
            tl.multiple_of(buffer.to(tl.pointer_type(tl.float32)), 16),
            tl.multiple_of(grad.to(tl.pointer_type(GRAD)), 16),
            start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :],
            end, momentum, undamped, decay, lr, factor, grad_scale,
            SPLIT, DECAY, MOMENTUM, FIRST, NESTEROV, MAXIMIZE, MASKED=False,
        )  # fmt: skip


GRADS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Table:
    """What a launch reads of its tensors and numbers on the device, made anew whenever one of them has changed.

    A CUDA graph finds its own again: what a captured launch reads is kept, and never written to.
    """

    def __init__(self):
        self.sizes: Any = None
        self.rows: Any = None
        self.tensors: Any = None
        self.values: Any = None
        self.staged: Any = None
        self.spare: Any = None
        self.captured: list[Any] = []

    def update(self, sizes, rows, numbers, device):
        """(tensor of each program, table, numbers) for the kernel, on the device."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.sizes != (sizes, device):
            self.refuse(capturing)
            programs = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
            self.tensors = torch.repeat_interleave(programs).to(torch.int32).to(device)
            self.sizes, self.rows = (sizes, device), None
        if self.rows != (rows, numbers):
            flat = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
            values = torch.cat([flat, torch.tensor(numbers, dtype=torch.float64).view(torch.int64)])
            self.values, self.rows = self.upload(values, device, capturing), (rows, numbers)
        if capturing:
            self.captured.append((self.tensors, self.values, self.staged))
        split = len(rows) * len(COLUMNS)
        return self.tensors, self.values[:split], self.values[split:].view(torch.float64)

    def upload(self, values, device, capturing):
        """On the device.  A graph replays the copy, from pinned memory, which cannot be had while it is captured."""
        if device.type != "cuda":
            return values.to(device)
        if capturing:
            self.refuse(self.spare is None)
            self.staged, self.spare = self.spare.copy_(values), None
        else:
            self.staged = values.pin_memory()
            if self.spare is None or self.spare.shape != values.shape:
                self.spare = torch.empty_like(values).pin_memory()
        return self.staged.to(device, non_blocking=True)

    def refuse(self, unprepared):
        if unprepared:
            raise RuntimeError(
                "take a step before the capture of a CUDA graph: it leaves the memory that this one needs"
            )


def check(weights, grads, momentum_buffers, lows):
    """Raises ValueError for tensors that the kernel cannot take."""
    device, dtype = weights[0].device, grads[0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"grads must be fp16, bf16 or fp32, got {dtype}")
    kinds = [("weights", weights, torch.bfloat16 if lows else torch.float32), ("grads", grads, dtype)]
    kinds += [("momentum_buffers", momentum_buffers, torch.float32)] if momentum_buffers else []
    kinds += [("lows", lows, torch.int16)] if lows else []
    for i, weight in enumerate(weights):
        if not is_packed(weight):
            raise ValueError(f"weights[{i}] must be packed, got {tuple(weight.shape)} with strides {weight.stride()}")
    for name, tensors, wanted in kinds:
        if len(tensors) != len(weights):
            raise ValueError(f"{name} must be as many as weights, {len(weights)}, got {len(tensors)}")
        for i, (x, weight) in enumerate(zip(tensors, weights, strict=True)):
            if x.dtype != wanted or x.device != device:
                raise ValueError(f"{name}[{i}] must be {wanted} on {device}, got {x.dtype} on {x.device}")
            if not lies_like(x, weight):
                raise ValueError(
                    f"{name}[{i}] must lie as weights[{i}], {tuple(weight.shape)} with strides "
                    f"{weight.stride()}, got {tuple(x.shape)} with strides {x.stride()}"
                )


def sgd_(
    weights,
    grads,
    momentum_buffers=None,
    lows=None,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
    factors=None,
    grad_scale=None,
    found_inf=None,
    table=None,
):
    """One step of SGD (formulas above) in place, in one launch.

    weights: fp32 tensors, or bf16 with `lows`, their lower halves in int16.  grads: all fp16, bf16 or fp32.
    momentum_buffers: fp32, wanted where momentum is not 0.  All of a weight's tensors are packed in memory, in the same
    order.  lr: a number, or a tensor of one, which the kernel reads, so that a captured CUDA graph follows it.
    first: the buffers hold nothing yet.  factors: fp32, one for each weight, or None.  grad_scale, found_inf: fp32
    tensors of one element, or None, as torch.amp.GradScaler hands them to fused optimizers: gradients are divided by
    the one, in memory too, and nothing happens where the other is 1.  table: a `Table` to keep between steps.

    Raises ValueError for tensors of other dtypes or layouts, for weights that share memory, for nesterov without
    momentum or with dampening.
    """
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov needs momentum and no dampening, got momentum {momentum}, dampening {dampening}")
    if (momentum != 0) != bool(momentum_buffers) and weights:
        raise ValueError(f"momentum_buffers go with a momentum, got {len(momentum_buffers or [])} and {momentum}")
    if not weights:
        return
    check(weights, grads, momentum_buffers, lows)
    device, nothing = weights[0].device, [0] * len(weights)
    for name, value, count in (
        ("lr", lr, 1), ("factors", factors, len(weights)), ("grad_scale", grad_scale, 1), ("found_inf", found_inf, 1)
    ):  # fmt: skip
        if isinstance(value, torch.Tensor) and (value.numel() != count or value.device != device):
            raise ValueError(f"{name} must have {count} elements on {device}, got {value.numel()} on {value.device}")
    table = table or Table()
    sizes = tuple(weight.numel() for weight in weights)
    starts, programs = [], 0
    for size in sizes:
        starts.append(programs)
        programs += triton.cdiv(size, BLOCK)
    if not programs:
        return
    addresses = [
        [x.data_ptr() for x in tensors] if tensors else nothing for tensors in (weights, lows, momentum_buffers, grads)
    ]
    rows = tuple(zip(starts, sizes, *addresses, strict=True))
    if table.rows is None or table.rows[0] != rows:
        written = {f"weights[{i}]": x for i, x in enumerate(weights)}
        written |= {f"momentum_buffers[{i}]": x for i, x in enumerate(momentum_buffers or [])}
        written |= {f"lows[{i}]": x for i, x in enumerate(lows or [])}
        refuse_shared_memory(written)
    numbers = (
        float(momentum),
        1.0 - dampening,
        float(weight_decay),
        0.0 if isinstance(lr, torch.Tensor) else float(lr),
    )
    tensors, values, numbers = table.update(sizes, rows, numbers, device)
    sgd_kernel[(programs,)](
        tensors,
        values,
        numbers,
        lr if isinstance(lr, torch.Tensor) else numbers[3:],
        factors,
        grad_scale,
        found_inf,
        GRAD=GRADS[grads[0].dtype],
        SPLIT=bool(lows),
        DECAY=weight_decay != 0,
        MOMENTUM=momentum != 0,
        FIRST=first,
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        WIDTH=len(COLUMNS),
        BLOCK=BLOCK,
        VEC=VEC,
        PIECE=THREADS,
        num_warps=warps(THREADS),
    )

"""What training does to a photograph, in one pass over it: random crop, mirror image, colour jitter, normalisation.

    y[n, c, i, j] = x[n, c, top + i, left + (size - 1 - j if mirrored else j)] * scale_c + shift_c
    scale_c = 1 / (255 * std_c),    shift_c = (sum_k axes[k][c] * a_k - mean_c) / std_c,    a_k ~ N(0, 1)

Krizhevsky et al. 2012, section 4.1.  top, left, mirrored and a depend on (seed, index of the picture) and nothing
else: one Philox block each, whose first word chooses one of the 2 * 33 * 33 crops of 224 pixels of 256, and whose
others are normal numbers by the inverse of the distribution.

150 KB are read of the 197 KB of a picture, and 301 KB of half precision written, or 312 KB of space-to-depth blocks.
The pictures are a batch, or the whole set of which `slots` names those of the batch: then the kernel reads them where
they lie, however many gigabytes those are, and nobody gathers a batch of bytes before.
"""

import math

import torch
import triton
import triton.language as tl

from .registers import DTYPES, pack, take, vector_width, warps

THREADS = 128
# Work items per thread, at most: the random numbers cost a thread as much as two items.
STEPS = 8

# Giles, "Approximating the erfinv function" (GPU Computing Gems 2, 2010), for w = -log(1 - x^2) below and above 5,
# highest power first: relative error 4e-7 in fp32.
CENTRAL = tl.constexpr(
    (
        2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
        -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
    )
)  # fmt: skip
TAIL = tl.constexpr(
    (
        -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
        -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
    )
)  # fmt: skip


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr):
    out = COEFFICIENTS[0]
    for i in tl.static_range(1, 9):
        out = out * x + COEFFICIENTS[i]
    return out


@triton.jit
def normal(word):
    """A standard normal number from 32 random bits: sqrt(2) * erfinv(x), x one of 2^24 odd multiples of 2^-24."""
    x = (2 * (word >> 8).to(tl.int32) + 1 - (1 << 24)).to(tl.float32) * 2.0**-24
    w = -tl.log((1.0 - x) * (1.0 + x))
    return 1.4142135623730951 * x * tl.where(w < 5.0, polynomial(w - 2.5, CENTRAL), polynomial(tl.sqrt(w) - 3.0, TAIL))


@triton.jit
def load_bytes(x_ptr, first, COUNT: tl.constexpr, WORDS: tl.constexpr, SIZE: tl.constexpr):
    """COUNT bytes from number `first` of a picture of SIZE bytes, as a tuple of fp32 values.

    WORDS: x_ptr points to 32-bit words, and the picture begins with one.  Aligned words are loaded and shifted: 7 loads
    for 24 bytes.  Places outside of the picture, where the caller wants nothing, read its ends.
    """
    out = ()
    if WORDS:
        NEEDED: tl.constexpr = (COUNT + 6) // 4  # for any alignment
        word = first >> 2
        shift = ((first & 3) * 8).to(tl.uint64)
        words = ()
        for i in tl.static_range(NEEDED):
            place = tl.minimum(tl.maximum(word + i, 0), SIZE // 4 - 1)
            words = words + (tl.load(x_ptr + place).to(tl.uint32, bitcast=True).to(tl.uint64),)
        for i in tl.static_range(COUNT):
            if i % 4 == 0:
                if i // 4 + 1 < NEEDED:
                    four = (((words[i // 4 + 1] << 32) | words[i // 4]) >> shift).to(tl.uint32)
                else:
                    four = (words[i // 4] >> shift).to(tl.uint32)
            out = out + (((four >> (8 * (i % 4))) & 0xFF).to(tl.float32),)
    else:
        for i in tl.static_range(COUNT):
            out = out + (tl.load(x_ptr + tl.minimum(tl.maximum(first + i, 0), SIZE - 1)).to(tl.float32),)
    return out


@triton.jit
def augment_kernel(
    x_ptr,  # (pictures, HEIGHT, WIDTH, 3) uint8; as int32 where WORDS
    slot_ptr,  # N int64: which of the pictures each is; None: they are the N of the batch
    index_ptr,  # N int64: the number of each picture in its set
    seed_ptr,  # one int64
    label_ptr,  # (pictures,) int64, or None
    y_ptr,  # (N, SIZE, SIZE, 3), or blocks of SQUARE x SQUARE pixels: (N, ROWS_OUT, COLUMNS_OUT, SQUARE * SQUARE * 3)
    y_label_ptr,  # N int64, or None
    pictures,
    batch,  # N
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,  # 3 numbers
    SHIFT: tl.constexpr,  # 3 numbers: -mean / std
    AXES: tl.constexpr,  # 9 numbers: axes[k][c] / std_c, by k
    CORNERS: tl.constexpr,  # (top, left, mirrored) of crop 0 of all N, of crop 1, ...; None: one a picture, drawn
    BLOCKS: tl.constexpr,  # SQUARE pixels a side, 1 for none; TOP and LEFT padding; ROWS_OUT and COLUMNS_OUT of them
    PIXELS: tl.constexpr,  # in a row of an item
    ROWS: tl.constexpr,  # of an item
    PROGRAMS: tl.constexpr,  # per picture
    PROGRAM_STEPS: tl.constexpr,
    WORDS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """An item is PIXELS neighbouring pixels of ROWS rows: 3 * PIXELS * ROWS neighbours in y, in either layout."""
    SQUARE: tl.constexpr = BLOCKS[0]
    TOP: tl.constexpr = BLOCKS[1]
    LEFT: tl.constexpr = BLOCKS[2]
    ROWS_OUT: tl.constexpr = BLOCKS[3]
    COLUMNS_OUT: tl.constexpr = BLOCKS[4]
    VALUES: tl.constexpr = 3 * PIXELS * ROWS
    ITEMS: tl.constexpr = ROWS_OUT * COLUMNS_OUT * SQUARE * SQUARE // (PIXELS * ROWS)
    PICTURE: tl.constexpr = HEIGHT * WIDTH * 3
    CROPS: tl.constexpr = HEIGHT - SIZE + 1
    PADDED: tl.constexpr = TOP > 0 or LEFT > 0 or ROWS_OUT * SQUARE - TOP > SIZE or COLUMNS_OUT * SQUARE - LEFT > SIZE
    program = tl.program_id(0)
    out = program // PROGRAMS
    n = out
    if CORNERS is not None:
        n = out % batch
        crop = out // batch
        top = tl.full((), 0, tl.int32)
        left = tl.full((), 0, tl.int32)
        flipped = tl.full((), 0, tl.int32)
        for k in tl.static_range(len(CORNERS) // 3):
            top = tl.where(crop == k, CORNERS[3 * k], top)
            left = tl.where(crop == k, CORNERS[3 * k + 1], left)
            flipped = tl.where(crop == k, CORNERS[3 * k + 2], flipped)
        mirrored = flipped != 0
        shifts = ()
        for c in tl.static_range(3):
            shifts = shifts + (tl.full((), SHIFT[c], tl.float32),)
    else:
        index = tl.load(index_ptr + n)
        w0, w1, w2, w3 = tl.philox(
            tl.load(seed_ptr), index.to(tl.uint32), (index >> 32).to(tl.uint32), tl.full((), 0, tl.uint32),
            tl.full((), 0, tl.uint32),
        )  # fmt: skip
        # one word chooses among all crops evenly, but for 2 * crops / 2^32
        choice = tl.umulhi(w0, tl.full((), 2 * CROPS * (WIDTH - SIZE + 1), tl.uint32)).to(tl.int32)
        mirrored = choice % 2 == 1
        top = choice // 2 % CROPS
        left = choice // (2 * CROPS)
        a0 = normal(w1)
        a1 = normal(w2)
        a2 = normal(w3)
        shifts = ()
        for c in tl.static_range(3):
            shifts = shifts + (SHIFT[c] + (a0 * AXES[c] + (a1 * AXES[3 + c] + a2 * AXES[6 + c])),)

    slot = n.to(tl.int64)
    if slot_ptr is not None:
        asked = tl.load(slot_ptr + n)
        slot = tl.minimum(tl.maximum(asked, 0), pictures - 1)
        # a picture that is not there is NaN all over: seen in the loss, and nothing outside of the set is read
        missing = tl.where(asked == slot, 0.0, float("nan"))
        shifts = (shifts[0] + missing, shifts[1] + missing, shifts[2] + missing)
    if label_ptr is not None:  # noqa: SIM102, the compiler knows this condition, and not the next
        if program % PROGRAMS == 0:
            tl.store(y_label_ptr + n, tl.load(label_ptr + slot))
    x_ptr += slot * (PICTURE // (4 if WORDS else 1))
    y_ptr += out.to(tl.int64) * (ITEMS * VALUES)
    for step in range(PROGRAM_STEPS):
        item = (program % PROGRAMS * PROGRAM_STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        real = item < ITEMS
        item = tl.minimum(item, ITEMS - 1)  # the others would read the rest of the picture
        if SQUARE == 1:
            row = item // (COLUMNS_OUT // PIXELS)
            column = item % (COLUMNS_OUT // PIXELS) * PIXELS
        else:
            cell = item // (SQUARE // ROWS)
            row = cell // COLUMNS_OUT * SQUARE + item % (SQUARE // ROWS) * ROWS - TOP
            column = cell % COLUMNS_OUT * SQUARE - LEFT
        across = left + tl.where(mirrored, SIZE - PIXELS - column, column)
        values = ()
        for r in tl.static_range(ROWS):
            x = load_bytes(x_ptr, ((top + row + r) * WIDTH + across) * 3, 3 * PIXELS, WORDS, PICTURE)
            for j in tl.static_range(PIXELS):
                for c in tl.static_range(3):
                    value = tl.where(mirrored, x[3 * (PIXELS - 1 - j) + c], x[3 * j + c]) * SCALE[c] + shifts[c]
                    if PADDED:
                        inside = (row + r >= 0) & (row + r < SIZE) & (column + j >= 0) & (column + j < SIZE)
                        value = tl.where(inside, value, 0.0)
                    values = values + (value,)
        first = item * VALUES
        for v in tl.static_range(VALUES // VEC):
            y = pack(take(values, v * VEC, (v + 1) * VEC), VEC).to(y_ptr.dtype.element_ty)
            place = (first + v * VEC)[:, None] + tl.arange(0, VEC)[None, :]
            tl.store(y_ptr + place, y, mask=real[:, None])


def augment(
    x,
    index,
    seed,
    size,
    mean,
    std,
    axes,
    *,
    block=1,
    padding=((0, 0), (0, 0)),
    dtype=torch.float16,
    slots=None,
    labels=None,
):
    """Random crops of uint8 pictures, half of them mirrored, jittered in colour and normalised (formula above).

    x: uint8 (N, 3, H, W), read in channels_last.  index: int64 (N,); seed: int64 tensor of one element, both on x's
    device, and both read by the kernel, so that a captured CUDA graph draws anew when they change.  size: of the
    crop.  mean, std: 3 numbers, for values in [0, 1].  axes: 3 vectors (R, G, B), each added a_k times.

    slots: int64 (N,) on x's device: x is (M, 3, H, W), in channels_last, and picture n lies at slots[n] of it; of a
    slot outside of [0, M) nothing is read, and its picture is NaN.  labels: int64 (M,), gathered in the same launch.

    block = 1: (N, 3, size, size) in channels_last.  block = 4: blocks of 4 x 4 pixels as channels, with the layout and
    meaning of padding of `space_to_depth`: (N, 48, H', W'), zeros after normalisation; negative numbers cut off.
    dtype: fp16, bf16 or fp32, rounded to once.

    Returns the pictures and their labels, int64 (N,), which are empty where none are given.
    Raises ValueError for what does not fit.
    """
    _check(x, slots, labels)
    batch, height, width = len(x if slots is None else slots), *x.shape[2:]
    if index.shape != (batch,) or index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(
            f"index must be int64 ({batch},) on {x.device}, got {index.dtype} {tuple(index.shape)} on {index.device}"
        )
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}")
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must lie in [1, {min(height, width)}] for pictures of {height}x{width}, got {size}")
    if 2 * (height - size + 1) * (width - size + 1) >= 2**31:
        raise ValueError(f"size {size} leaves more crops of {height}x{width} than a word of 32 bits can choose among")
    axes = tuple(tuple(map(float, axis)) for axis in axes)
    if len(axes) != 3 or any(len(axis) != 3 for axis in axes):
        raise ValueError(f"axes must be 3 vectors of 3 numbers, got {axes}")
    return _launch(
        x, size, mean, std, block=block, padding=padding, dtype=dtype, slots=slots, labels=labels,
        index=index, seed=seed, axes=axes,
    )  # fmt: skip


def crops(x, corners, size, mean, std, *, dtype=torch.float16, slots=None):
    """The same crops of every picture, normalised: (K * N, 3, size, size) in channels_last, crop 0 of all first.

    corners: K triples (top, left, mirrored).  The other arguments are those of `augment`.

    Raises ValueError for what does not fit.
    """
    _check(x, slots, None)
    height, width = x.shape[2:]
    corners = tuple((int(top), int(left), bool(mirrored)) for top, left, mirrored in corners)
    bottom, right = height - size, width - size
    if not corners or any(not (0 <= top <= bottom and 0 <= left <= right) for top, left, _ in corners):
        raise ValueError(f"corners must be those of crops of {size} pixels in {height}x{width}, got {corners}")
    return _launch(x, size, mean, std, dtype=dtype, slots=slots, corners=corners)[0]


def _check(x, slots, labels):
    if x.dim() != 4 or x.shape[1] != 3 or x.dtype != torch.uint8:
        raise ValueError(f"x must be uint8 (N, 3, H, W), got {x.dtype} {tuple(x.shape)}")
    if slots is not None and (slots.dim() != 1 or slots.dtype != torch.int64 or slots.device != x.device):
        raise ValueError(
            f"slots must be int64 (N,) on {x.device}, got {slots.dtype} {tuple(slots.shape)} on {slots.device}"
        )
    if slots is not None and not x.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError("x must be in channels_last where slots are given: the whole set would be copied")
    if labels is not None and slots is None:
        raise ValueError("labels need slots: those of a batch need no gathering")
    pictures = len(x)
    if labels is not None and (labels.shape != (pictures,) or labels.dtype != torch.int64 or labels.device != x.device):
        raise ValueError(
            f"labels must be int64 ({pictures},) on {x.device}, "
            f"got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )


def _launch(
    x,
    size,
    mean,
    std,
    *,
    dtype,
    slots,
    block=1,
    padding=((0, 0), (0, 0)),
    labels=None,
    index=None,
    seed=None,
    axes=((0.0,) * 3,) * 3,
    corners=(),
):
    """One launch: of crops that are drawn for `index` and `seed`, or of those at the corners."""
    pictures, _, height, width = x.shape
    batch = pictures if slots is None else len(slots)
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must lie in [1, {min(height, width)}] for pictures of {height}x{width}, got {size}")
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"mean and std must be 3 numbers, std above 0, got {mean} and {std}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be fp16, bf16 or fp32, got {dtype}")
    (top, bottom), (left, right) = padding
    if block not in (1, 4) or (block == 1 and any((top, bottom, left, right))):
        raise ValueError(f"block must be 1 without padding, or 4, got {block} and {padding}")
    rows, columns = (size + top + bottom) // block, (size + left + right) // block
    if min(rows, columns) < 1 or (size + top + bottom) % block or (size + left + right) % block:
        raise ValueError(f"padding must make size {size} positive multiples of {block}, got {padding}")

    y = torch.empty(
        (batch * max(1, len(corners)), 3 * block * block, rows, columns),
        dtype=dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    y_labels = torch.empty(0 if labels is None else batch, dtype=torch.int64, device=x.device)
    if batch == 0:
        return y, y_labels
    if pictures == 0:
        raise ValueError(f"x must hold pictures where slots name {batch} of them, got {tuple(x.shape)}")
    x = x.permute(0, 2, 3, 1).contiguous()
    vec = vector_width(dtype)
    if block == 1:
        item_pixels, item_rows = math.gcd(size, 8), 1
    else:
        item_pixels, item_rows = block, max(1, vec // math.gcd(3 * block, vec))
    values = 3 * item_pixels * item_rows
    items = rows * columns * block * block // (item_pixels * item_rows)
    programs = triton.cdiv(items, THREADS * STEPS)
    words = height * width * 3 % 4 == 0 and x.storage_offset() % 4 == 0
    augment_kernel[(len(y) * programs,)](
        x.view(-1).view(torch.int32) if words else x,
        None if slots is None else slots.contiguous(),
        None if index is None else index.contiguous(),
        seed,
        None if labels is None else labels.contiguous(),
        y,
        None if labels is None else y_labels,
        pictures,
        batch,
        HEIGHT=height,
        WIDTH=width,
        SIZE=size,
        SCALE=tuple(1 / (255 * s) for s in std),
        SHIFT=tuple(-m / s for m, s in zip(mean, std, strict=True)),
        AXES=tuple(value / s for axis in axes for value, s in zip(axis, std, strict=True)),
        CORNERS=tuple(int(number) for corner in corners for number in corner) or None,
        BLOCKS=(block, top, left, rows, columns),
        PIXELS=item_pixels,
        ROWS=item_rows,
        PROGRAMS=programs,
        PROGRAM_STEPS=triton.cdiv(items, programs * THREADS),
        WORDS=words,
        VEC=math.gcd(values, vec),
        BLOCK=THREADS,
        num_warps=warps(THREADS),
    )
    return y, y_labels

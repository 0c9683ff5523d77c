"""What the compiler makes of the kernels, as rows, tables and JSON, and what that says about time on named chips.

The rows come from `fastalex.inspection.compiler` (registers, spills, memory, access widths, instructions by pipe) and
`fastalex.inspection.traffic` (DRAM bytes, counted).  Times are modelled from them and called so wherever they are
shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastalex.backend import HAS_TRITON
from fastalex.files import write_whole
from fastalex.inspection.chips import CHIPS, resident_warps, times

Row = dict[str, Any]
# More instructions than this, relative to the older file, are a regression.
MORE_INSTRUCTIONS = 1.05
TABLES = {
    "kernels": ("<!-- kernel table: make kernel-table -->\n", "<!-- end of kernel table -->"),
    "chips": ("<!-- chip table: make kernel-table -->\n", "<!-- end of chip table -->"),
}


def names(dtypes: Iterable[str], text: str = "", every: bool = False) -> list[str]:
    """The catalogue's entries of these dtypes ("tf32": float32 convolutions with TF32) that `text` names: those with
    such a part in their name, as "lrn", or, where there are none, with this text anywhere in it.

    Unless `every`, those that differ, of training in channels_last: of convolutions the paper's, in fp16 and tf32,
    because bf16's code is fp16's but for the name of an instruction.  Raises ValueError if none is left, and where
    Triton is not installed.
    """
    if not HAS_TRITON:
        raise ValueError("the kernels cannot be compiled: the triton package is not installed")
    from fastalex.inspection import catalog

    found = []
    for dtype in dtypes:
        of_dtype = [name for name in catalog.ENTRIES if _kind(name) == dtype]
        if not every:
            differing = {entry.name for entry in catalog.representative(dtype)}
            if dtype in ("fp16", "tf32"):
                differing |= {name for name in of_dtype if _is_paper_convolution(name)}
            of_dtype = [name for name in of_dtype if name in differing]
        found += of_dtype
    parts = [name for name in found if text in name.split("/")]
    found = parts or [name for name in found if text in name]
    if not found:
        raise ValueError(
            f"no entry of the catalogue has {text!r} in its name; it has such as {next(iter(catalog.ENTRIES))}"
        )
    return found


def _kind(name: str) -> str:
    return name.split("/")[4]


def _is_paper_convolution(name: str) -> bool:
    return name.startswith("paper/") and name.split("/")[2].startswith("conv_")


def requests(names: Sequence[str], targets: Sequence[str]) -> list[tuple[str, str]]:
    """What `rows` asks the compiler for: each entry for each target, and its traffic."""
    return [(name, target) for name in names for target in (*targets, "traffic")]


def rows(names: Sequence[str], targets: Sequence[str], done: Callable[[], object] | None = None) -> list[Row]:
    """One row per launch, but those that add up partial sums; an entry that does not compile gives a row with "error".

    names: entries of the catalogue.  Compiles what the cache does not hold, for minutes if that is much.
    done: called, in any thread, after each request that was not in the cache.
    """
    from fastalex.inspection import catalog, compiler

    found = compiler.results(requests(names, targets), done=done)
    out = []
    for name in names:
        entry = catalog.ENTRIES[name]
        elements = entry.image_elements * entry.batch
        for target in targets:
            shared = {"entry": name, "target": target, "dtype": _kind(name), "layer": f"{entry.variant} {entry.layer}"}
            built, traffic = found[name, target], found[name, "traffic"]
            errors = [answer["error"] for answer in (built, traffic) if "error" in answer]
            if errors:
                out.append({**shared, "error": errors[0]})
                continue
            # whose levels depend on the batch, which is smaller where traffic is counted
            launches = (
                [row for row in answer if row["kernel"] != "sum_partials_kernel"] for answer in (built, traffic)
            )
            for code, moved in zip(*launches, strict=True):
                flops = entry.flops if code["products"] else 0
                counted = {
                    "instructions": rounded(code["instructions"]),
                    "pipes": {pipe: rounded(number) for pipe, number in code["pipes"].items()},
                    "dram": rounded(moved["read"] + moved["written"]),
                }
                out.append({**shared, **code, **counted, "flops": flops, "elements": elements})
    return [with_model(row) for row in out]


def rounded(value: float | None) -> float | None:
    """Five digits are more than a count per element means."""
    return None if value is None else float(f"{value:.5g}")


def with_model(row: Row) -> Row:
    """The row with "resident_warps", and under "modelled_us" the microseconds of each resource of each chip."""
    if "error" in row:
        return row
    resident = resident_warps(row["target"], registers=row["registers"], shared=row["shared"], warps=row["warps"])
    elements = row["elements"]
    modelled = {
        chip.name: {
            resource: rounded(1e6 * seconds)
            for resource, seconds in times(
                chip,
                pipes={pipe: number * elements for pipe, number in row["pipes"].items()},
                dram_bytes=row["dram"] * elements,
                flops=row["flops"] * elements,
                dtype=row["dtype"],
            ).items()
        }
        for chip in CHIPS
        if chip.target == row["target"]
    }
    return {**row, "resident_warps": resident, "modelled_us": modelled}


def bound(modelled: dict[str, float]) -> str:
    """The resource that is busy longest."""
    return max(modelled, key=modelled.__getitem__)


# ------------------------------------------------------------------------------------------------------- tables
COLUMNS = (
    "layer", "kernel", "dtype", "target", "registers", "spills", "shared", "tensor memory", "warps/SM", "loads",
    "stores", "matrix product", "loop/product", "instr/el", "DRAM B/el", "issue : DRAM",
)  # fmt: skip
PIPE_COLUMNS = ("layer", "kernel", "dtype", "target", "fma", "alu", "xu", "lsu", "tensor", "uniform", "control")
MODEL_COLUMNS = (
    "layer", "kernel", "dtype", "chip", "issue us", "fma us", "alu us", "xu us", "lsu us", "matrix us", "DRAM us",
    "bound",
)  # fmt: skip
Table = tuple[tuple[str, ...], list[list[str]]]


def widths(counts: dict[str, int]) -> str:
    """'2x16 1x4': so many accesses of so many bytes."""
    return " ".join(f"{counts[width]}x{width}" for width in sorted(counts, key=int, reverse=True)) or "-"


def _loads(row: Row) -> str:
    """Loads, then what is copied to shared memory without registers: vectors, and tiles of descriptors."""
    parts = [widths(row["loads"])]
    if row["copies"]:
        parts.append(f"async {widths(row['copies'])}")
    if row["tiles"]:
        parts.append(f"{row['tiles']} tiles")
    return ", ".join(part for part in parts if part != "-") or "-"


def per_product(row: Row) -> float | None:
    """Instructions of the main loop per matrix instruction in it, None without such a loop."""
    return None if row["main_loop"] is None else row["main_loop"][0] / row["main_loop"][1]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _head(row: Row) -> list[str]:
    """Layer, kernel and dtype; the algorithm of a convolution behind its kernel, which several share."""
    _, _, operation, algorithm, *_ = row["entry"].split("/")
    kernel = row["kernel"].removesuffix("_kernel")
    return [row["layer"], f"{kernel} ({algorithm})" if operation.startswith("conv_") else kernel, row["dtype"]]


def code_table(found: Iterable[Row]) -> Table:
    """Registers to traffic, one line per launch; a line with the reason for what did not compile."""
    lines = []
    for row in found:
        if "error" in row:
            what = row["entry"].split("/")[2]
            line = [row["layer"], what, row["dtype"], row["target"], row["error"]]
            lines.append(line + ["-"] * (len(COLUMNS) - len(line)))
            continue
        modelled: dict[str, float] = next(iter(row["modelled_us"].values()), {})
        ratio = modelled["issue"] / modelled["DRAM"] if "issue" in modelled else None
        lines.append(
            [
                *_head(row), row["target"], str(row["registers"]), str(row["spills"] + row["stack"]),
                str(row["shared"]), str(row["tensor_memory"]), _number(row["resident_warps"], 0), _loads(row),
                widths(row["stores"]), " ".join(row["products"]) or "-", _number(per_product(row)),
                _number(row["instructions"]), _number(row["dram"], 2), _number(ratio, 2),
            ]
        )  # fmt: skip
    return COLUMNS, lines


def pipe_table(found: Iterable[Row]) -> Table:
    """Instructions that threads issue per element, by pipe."""
    counted = [row for row in found if row.get("pipes")]
    return PIPE_COLUMNS, [
        [*_head(row), row["target"], *(_number(row["pipes"].get(pipe, 0), 2) for pipe in PIPE_COLUMNS[4:])]
        for row in counted
    ]


def model_table(found: Iterable[Row]) -> Table:
    """Microseconds per resource on each chip of the target, modelled."""
    lines = []
    for row in found:
        for chip, modelled in row.get("modelled_us", {}).items():
            numbers = [_number(modelled.get(column.removesuffix(" us"))) for column in MODEL_COLUMNS[4:-1]]
            lines.append([*_head(row), chip, *numbers, bound(modelled)])
    return MODEL_COLUMNS, lines


def chip_table() -> Table:
    """The constants of the model and their sources."""
    columns = (
        *("chip", "target", "SMs", "GHz", "DRAM TB/s", "fp16 TFLOP/s", "tf32 TFLOP/s"),
        *("memory GB", "link GB/s", "host GB/s", "source"),
    )
    return columns, [
        [
            chip.name, chip.target, str(chip.multiprocessors), str(chip.clock), str(chip.dram), f"{chip.matrix_fp16:g}",
            f"{chip.matrix_tf32:g}", f"{chip.memory:g}", f"{chip.link:g}", f"{chip.host:g}", chip.source,
        ]
        for chip in CHIPS
    ]  # fmt: skip


def markdown(table: Table) -> str:
    columns, lines = table
    numeric = [all(line[i][:1].isdigit() or line[i] == "-" for line in lines) for i in range(len(columns))]
    rule = ["---:" if is_number else "---" for is_number in numeric]
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, rule, *lines])


def plain(table: Table) -> str:
    columns, lines = table
    width = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() + "\n"
        for line in [columns, *lines]
    )


def report(found: Sequence[Row]) -> str:
    """Everything as text: the code, its pipes, and the modelled times, which are called so."""
    parts = [plain(code_table(found))]
    if any(row.get("pipes") for row in found):
        parts.append("Instructions that threads issue per element, by pipe\n\n" + plain(pipe_table(found)))
    if any(row.get("modelled_us") for row in found):
        parts.append(
            "MODELLED, not measured: microseconds that each resource needs on its own (constants: --chips)\n\n"
            + plain(model_table(found))
        )
    return "\n".join(parts)


def comparison(old: dict[str, Any], found: Sequence[Row]) -> str:
    """What changed since the older file, and what of it is worse."""
    import triton

    table = changes(old["rows"], found)
    lines = []
    if old["triton"] != triton.__version__:
        lines.append(f"The older file is of Triton {old['triton']}, this is {triton.__version__}.\n\n")
    lines.append(plain(table) if table[1] else "No number changed.\n")
    lines += [f"WORSE: {line}\n" for line in regressions(old["rows"], found)]
    return "".join(lines)


def replace_between(text: str, markers: tuple[str, str], replacement: str) -> str:
    """The text with the part between two markers replaced.  Raises ValueError unless each stands there once."""
    if any(text.count(marker) != 1 for marker in markers):
        raise ValueError(f"the file must contain these two lines once each: {markers[0].strip()} and {markers[1]}")
    before, rest = text.split(markers[0])
    return f"{before}{markers[0]}\n{replacement}\n{markers[1]}{rest.split(markers[1])[1]}"


def write_tables(path: Path, found: Iterable[Row]) -> None:
    """Put the tables of kernels and chips between their markers of a Markdown file."""
    text = replace_between(path.read_text(), TABLES["kernels"], markdown(code_table(found)))
    write_whole(path, replace_between(text, TABLES["chips"], markdown(chip_table())))


# --------------------------------------------------------------------------------------------------------- files
def save(path: Path, found: Iterable[Row]) -> None:
    """Write rows as JSON, one row a line, so that a difference between two files reads well."""
    import torch
    import triton

    head = json.dumps({"schema": 1, "triton": triton.__version__, "torch": torch.__version__})
    # compile times are this machine's
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in found]
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in kept)
    write_whole(path, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def load(path: Path) -> dict[str, Any]:
    """The content of a file that `save` wrote.  Raises ValueError for another."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != 1 or not isinstance(content["rows"], list):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a file that `fastalex inspect --json` wrote") from None
    return content


# --------------------------------------------------------------------------------------------------- comparison
COMPARED = ("registers", "spills", "stack", "shared", "tensor_memory", "instructions", "dram")


def by_launch(found: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """Rows by entry, target and kernel (none: it did not compile); the second launch of a kernel has a + behind it."""
    out: dict[tuple[str, str, str], Row] = {}
    for row in found:
        kernel = row.get("kernel", "")
        while (row["entry"], row["target"], kernel) in out:
            kernel += "+"
        out[row["entry"], row["target"], kernel] = row
    return out


def _quantity(row: Row, name: str) -> float | None:
    """One number of a row, None if it is not known or nothing was compiled."""
    return per_product(row) if name == "loop/product" and "main_loop" in row else row.get(name)


def changes(old: Iterable[Row], new: Iterable[Row]) -> Table:
    """The numbers that differ between rows that both have."""
    before, after = by_launch(old), by_launch(new)
    lines = []
    for key in before.keys() & after.keys():
        for quantity in (*COMPARED, "loop/product"):
            a, b = _quantity(before[key], quantity), _quantity(after[key], quantity)
            if a is not None and b is not None and a != b:
                percent = f"{100 * (b / a - 1):+.1f} %" if a else "-"
                lines.append([*key, quantity, f"{a:g}", f"{b:g}", percent])
    return ("entry", "target", "kernel", "quantity", "old", "new", "change"), sorted(lines)


def regressions(old: Iterable[Row], new: Iterable[Row]) -> list[str]:
    """What is worse: spills, more than 5 % more instructions, or no code any more, where both files have the entry."""
    before, after = by_launch(old), by_launch(new)
    targets = {key[:2] for key in after}
    out = []
    for (entry, target, kernel), row in before.items():
        if (entry, target) not in targets or "error" in row:
            continue
        name = f"{entry} for {target}"
        now = after.get((entry, target, kernel))
        if now is None:
            errors = [other["error"] for key, other in after.items() if key[:2] == (entry, target) and "error" in other]
            out.append(f"{name}: {errors[0] if errors else f'no launch of {kernel}'}")
            continue
        spilt, was = now["spills"] + now["stack"], row["spills"] + row["stack"]
        if spilt > was:
            out.append(f"{name}: {kernel} spills: {was} -> {spilt} (instructions and bytes of stack)")
        if row["instructions"] and (now["instructions"] or 0) > MORE_INSTRUCTIONS * row["instructions"]:
            out.append(f"{name}: {kernel} issues {row['instructions']:.2f} -> {now['instructions']:.2f} per element")
        loop, before_loop = per_product(now), per_product(row)
        if before_loop and (loop or 0) > MORE_INSTRUCTIONS * before_loop:
            out.append(f"{name}: {kernel} loops {before_loop:.2f} -> {loop:.2f} instructions per matrix product")
    return out

"""Rows, tables, files and comparison of `fastalex inspect`, on results that no compiler had to make."""

import json
import re

import pytest

from fastalex import cli
from fastalex.inspection import compiler, machine_code
from fastalex.inspection.chips import ARCHITECTURES, CHIPS, resident_warps, times

NAME = "caffenet/conv1/lrn/forward/fp16/channels_last"
LAUNCH = {
    "kernel": "lrn_fwd_kernel", "programs": 8748, "warps": 4, "registers": 31, "stack": 0, "spills": 0, "shared": 0,
    "tensor_memory": 0, "loads": {"4": 2, "16": 1}, "stores": {"16": 1}, "copies": {}, "tiles": 0, "products": {},
    "main_loop": None, "instructions": 13.5, "pipes": {"fma": 8.0, "alu": 3.5, "xu": 2.0},
    "seconds": 1.25,
}  # fmt: skip
SUM = {**LAUNCH, "kernel": "sum_partials_kernel"}
MOVED = {"kernel": "lrn_fwd_kernel", "read": 2.0, "written": 2.0}


@pytest.fixture
def answers(monkeypatch):
    """Stands for the compiler: what it answers per target, for every entry."""
    found = {"sm_90": [LAUNCH, SUM], "sm_80": [LAUNCH, SUM], "traffic": [MOVED, {**MOVED, "kernel": SUM["kernel"]}]}
    found["gfx942"] = [{**LAUNCH, "instructions": None, "pipes": {}}, SUM]
    monkeypatch.setattr(compiler, "results", lambda asked, done: {request: found[request[1]] for request in asked})
    return found


# ---- chips


def test_clocks_give_the_published_matrix_rates():
    """FLOP per clock and multiprocessor of the architectures' matrix units, whitepapers."""
    per_clock = {"sm_80": 2048, "sm_86": 1024, "sm_89": 512, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
    for chip in CHIPS:
        if chip.target in per_clock:
            rate = chip.multiprocessors * chip.clock * per_clock[chip.target] / 1e3
            assert rate == pytest.approx(chip.matrix_fp16, rel=0.01), chip.name
            assert chip.source


def test_every_target_has_a_chip():
    assert {chip.target for chip in CHIPS} == set(compiler.TARGETS)
    assert set(ARCHITECTURES) == set(compiler.TARGETS) - {"gfx942"}


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 31, 0, 4, 64),
        ("sm_90", 32, 0, 1, 32),  # 32 programs at most
        ("sm_90", 112, 0, 4, 16),  # 65536 / (112 x 128) = 4.6 programs
        ("sm_90", 105, 0, 4, 16),  # registers come by 8
        ("sm_86", 31, 0, 4, 48),
        ("sm_80", 32, 80 << 10, 4, 8),  # 164 KiB hold two programs of 81
        ("gfx942", 32, 0, 4, None),
    ],
)
def test_resident_warps(target, registers, shared, warps, expected):
    assert resident_warps(target, registers=registers, shared=shared, warps=warps) == expected


def test_times_are_work_over_rate():
    h100 = next(chip for chip in CHIPS if chip.name == "H100")
    busy = times(h100, pipes={"fma": 128e9, "xu": 16e9, "control": 16e9}, dram_bytes=3.35e12, flops=989.4e12)
    clocks = 1e9 / (132 * 1.83e9)
    assert busy["DRAM"] == busy["matrix"] == 1
    assert busy["fma"] == pytest.approx(clocks)
    assert busy["xu"] == pytest.approx(clocks)
    assert busy["issue"] == pytest.approx(160 / 128 * clocks)
    assert times(h100, pipes={}, dram_bytes=3.35e12) == {"DRAM": 1}
    assert times(h100, pipes={}, dram_bytes=None, flops=494.7e12, dtype="tf32") == {"matrix": 1}
    # without matrix units: two FLOP per instruction of the fma pipe
    assert times(h100, pipes={}, dram_bytes=None, flops=256e9, dtype="fp32")["fma"] == pytest.approx(clocks)


# ---- rows and tables


def test_rows(answers):
    (row,) = machine_code.rows([NAME], ["sm_90"])
    assert (row["layer"], row["dtype"], row["dram"], row["resident_warps"]) == ("caffenet conv1", "fp16", 4.0, 64)
    assert row["elements"] == 128 * 96 * 27 * 27
    assert list(row["modelled_us"]) == ["H100", "H200"]
    assert machine_code.bound(row["modelled_us"]["H100"]) == "DRAM"
    (table,) = machine_code.code_table([row])[1]
    assert table == [
        "caffenet conv1", "lrn_fwd", "fp16", "sm_90", "31", "0", "0", "0", "64", "1x16 2x4", "1x16", "-", "-", "13.5",
        "4.00", "0.37",
    ]  # fmt: skip
    text = machine_code.report([row])
    assert "MODELLED, not measured" in text
    assert text.count("lrn_fwd") == 4  # code, pipes, and two chips


def test_rows_of_a_convolution(answers):
    name = "paper/conv3/conv_relu/batch_tiled/tf32/channels_last"
    code = {
        **LAUNCH, "kernel": "conv_relu_batch_kernel", "copies": {"16": 42}, "tiles": 2, "instructions": None,
        "pipes": {}, "products": {"HGMMA.64x128x8.F32.TF32": 8}, "main_loop": [142, 16],
    }  # fmt: skip
    answers["sm_90"] = [code]
    answers["traffic"] = [MOVED]
    (row,) = machine_code.rows([name], ["sm_90"])
    assert (row["dtype"], row["flops"], row["elements"]) == ("tf32", 2 * 256 * 9, 256 * 384 * 13 * 13)
    assert machine_code.bound(row["modelled_us"]["H100"]) == "matrix"
    (line,) = machine_code.code_table([row])[1]
    assert line[9:13] == ["1x16 2x4, async 42x16, 2 tiles", "1x16", "HGMMA.64x128x8.F32.TF32", "8.9"]

    old = [{"entry": name, "target": "sm_90", **code}]
    assert machine_code.regressions(old, [{**old[0], "main_loop": [149, 16]}]) == []
    (worse,) = machine_code.regressions(old, [{**old[0], "main_loop": [150, 16]}])
    assert "loops 8.88 -> 9.38 instructions per matrix product" in worse
    ((*_, quantity, _, _, percent),) = machine_code.changes(old, [{**old[0], "main_loop": [150, 16]}])[1]
    assert (quantity, percent) == ("loop/product", "+5.6 %")


def test_rows_of_amd_have_no_instructions(answers):
    (row,) = machine_code.rows([NAME], ["gfx942"])
    assert row["resident_warps"] is None
    assert list(row["modelled_us"]["MI300X"]) == ["DRAM"]
    assert machine_code.code_table([row])[1][0][-3:] == ["-", "4.00", "-"]


def test_an_error_is_a_row(answers, capsys):
    pytest.importorskip("tyro")
    answers["sm_80"] = {"error": "PTX refused"}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "--kernel", NAME, "--dtype", "fp16", "--target", "sm_80", "sm_90"])
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "PTX refused" in text
    assert "13.5" in text


def test_markdown_file(answers, tmp_path):
    pytest.importorskip("tyro")
    path = tmp_path / "page.md"
    path.write_text(
        "before\n" + "\nbetween\n".join("".join(markers) for markers in machine_code.TABLES.values()) + "\n"
    )
    arguments = ["inspect", "--markdown", str(path), "--kernel", NAME, "--dtype", "fp16"]
    cli.main(arguments)
    text = path.read_text()
    assert text.startswith("before\n")
    assert (
        "| caffenet conv1 | lrn_fwd | fp16 | sm_90 | 31 | 0 | 0 | 0 | 64 | 1x16 2x4 | 1x16 | - | - | 13.5 | 4.00 |"
        in text
    )
    assert all(f"| {chip.name} | {chip.target} |" in text for chip in CHIPS)
    cli.main(arguments)
    assert path.read_text() == text


def test_files_without_markers(answers, tmp_path, capsys):
    pytest.importorskip("tyro")
    path = tmp_path / "page.md"
    path.write_text("no markers")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "--markdown", str(path), "--kernel", NAME, "--dtype", "fp16"])
    assert stopped.value.code == 2
    assert "must contain these two lines" in capsys.readouterr().err
    assert path.read_text() == "no markers"


def test_chips_are_printed_without_compiling(capsys, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.setattr(compiler, "results", None)
    cli.main(["inspect", "--chips"])
    text = capsys.readouterr().out
    assert all(chip.name in text and chip.source in text for chip in CHIPS)


def test_chart(answers, tmp_path):
    pytest.importorskip("tyro")
    path = tmp_path / "chart.svg"
    cli.main(["inspect", "--chart", str(path), "--kernel", NAME, "--dtype", "fp16"])
    assert path.stat().st_size > 5000


# ---- files and comparison


def test_compare(answers, tmp_path, capsys):
    pytest.importorskip("tyro")
    path = tmp_path / "old.json"
    arguments = ["inspect", "--kernel", NAME, "--dtype", "fp16"]
    cli.main([*arguments, "--json", str(path)])
    assert "seconds" not in path.read_text()
    capsys.readouterr()

    cli.main([*arguments, "--compare", str(path)])
    assert capsys.readouterr().out == "No number changed.\n"

    answers["sm_90"] = [{**LAUNCH, "instructions": 1.05 * 13.5, "registers": 40}, SUM]
    cli.main([*arguments, "--compare", str(path)])
    text = capsys.readouterr().out
    assert "registers" in text
    assert "+5.0 %" in text

    answers["sm_90"] = [{**LAUNCH, "instructions": 1.06 * 13.5, "spills": 2}, SUM]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--compare", str(path)])
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "WORSE: caffenet/conv1/lrn/forward/fp16/channels_last for sm_90: lrn_fwd_kernel spills: 0 -> 2" in text
    assert "issues 13.50 -> 14.31 per element" in text

    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "triton": "3.0"}))
    answers["sm_90"] = [LAUNCH, SUM]
    cli.main([*arguments, "--compare", str(path)])
    assert "The older file is of Triton 3.0" in capsys.readouterr().out


def test_regressions_of_what_no_longer_compiles():
    old = [{"entry": NAME, "target": "sm_90", **LAUNCH}]
    assert "refused" in machine_code.regressions(old, [{"entry": NAME, "target": "sm_90", "error": "refused"}])[0]
    other = {"entry": NAME, "target": "sm_90", **LAUNCH, "kernel": "other_kernel"}
    assert "no launch of lrn_fwd_kernel" in machine_code.regressions(old, [other])[0]
    # the second launch of a kernel is compared with the second
    twice = [*old, {**old[0], "spills": 1}]
    assert len(machine_code.regressions(2 * old, twice)) == 1
    # nothing is said about what was not compiled this time
    assert machine_code.regressions(old, []) == []


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 2, "rows": []}', '{"schema": 1, "rows": 3}'])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a file that `fastalex inspect --json` wrote"):
        machine_code.load(path)


def test_names_by_a_part_or_by_any_text():
    """ "lrn" is the operation and not the beginning of lrn_max_pool."""
    parts = {name.split("/")[2] for name in machine_code.names(["fp16"], "lrn")}
    assert parts == {"lrn"}
    assert {name.split("/")[2] for name in machine_code.names(["fp16"], "lrn_max")} == {"lrn_max_pool"}
    assert all("/conv1/" in name for name in machine_code.names(["fp16"], "conv1"))
    assert machine_code.names(["fp16", "bf16"], NAME) == [NAME]


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_to_do_is_said_first(cached, answers, capsys, monkeypatch, tmp_path):
    pytest.importorskip("tyro")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    requests = machine_code.requests([NAME], ["sm_80", "sm_90"])
    for request in requests if cached else []:
        compiler.write_atomically(compiler.cache_file(*request), "[]")
    assert compiler.uncached(requests) == ([] if cached else sorted(requests))
    cli.main(["inspect", "--kernel", NAME, "--target", "sm_80", "sm_90"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("1 entry for sm_80, sm_90: ")
    if cached:
        assert first.endswith("0 compilations and 0 counts of DRAM bytes to do, all of it is in the cache")
    else:
        assert re.search(r"2 compilations and 1 count of DRAM bytes to do, about \d+ seconds?$", first)


@pytest.mark.parametrize(("cores", "gigabytes", "expected"), [(2, 16, 2), (64, 8, 8), (4, 0.5, 1)])
def test_processes_fit_the_machine(cores, gigabytes, expected, monkeypatch):
    monkeypatch.setattr(compiler.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gigabytes * 2**30) // 4096}
    monkeypatch.setattr(compiler.os, "sysconf", pages.__getitem__)
    assert compiler.enough_processes() == expected


def test_no_entry(capsys):
    with pytest.raises(ValueError, match="'conv9' in its name; it has such as paper/conv1"):
        machine_code.names(["fp16"], "conv9")
    some = machine_code.names(["fp16", "tf32"])
    assert {"paper/conv3/conv_relu/split_k/tf32/channels_last", NAME} <= set(some)
    assert len(machine_code.names(["fp16", "tf32"], every=True)) > 2 * len(some)

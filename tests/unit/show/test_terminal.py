"""What a user sees: tables, figures, live lines. Missing values are said to be missing, never shown as 0 or 1."""

import io
import json
import threading
from dataclasses import replace

import pytest
from records import cycle_record
from rich.console import Console

from dmsae_ray.show import columns, figures
from dmsae_ray.show.terminal import tables
from dmsae_ray.show.terminal.progress import LiveLines, ProgressBoard, duration, format_status

ROW = columns.ChainRow(
    label="seed0-k16",
    sizes=(49, 70, 81, 83),
    origins=({0: 49}, {0: 49, 1: 21}, {0: 49, 1: 21, 2: 11}, {0: 49, 1: 21, 2: 8, 3: 5}),
    jaccard=(0.7, 0.83, 0.9),
    l0=16.1,
    core_l0=10.4,
    fvu=0.16,
    loss_recovered=0.944,
    loss_recovered_mean=0.905,
    dead=0.012,
    tokens_per_s=12345.0,
    status="done",
)
EMPTY = columns.ChainRow("seed1-k32", "not started")


def pair(a="seed0-k16", b="seed1-k16", **changes):
    null = {"available": True, "reason": None, "p99": 0.31, "density_gap": None}
    gone = null | {"available": False, "p99": None, "density_gap": 3.14}
    nulls = {"covariance": null, "matched_density": gone, "cycle0": null | {"p99": 0.55}}
    values = {
        "size_a": 83,
        "size_b": 84,
        "differs": "seed",
        "overlap": 0.61,
        "shared": 51,
        "pw_mcc": 0.77,
        "mmcs_ab": 0.81,
        "mmcs_ba": 0.81,
        "activation": 0.66,
        "pw_mcc_dictionary": 0.44,
        "nulls": nulls,
    }
    return {"a": a, "b": b} | values | changes


def comparison(chains, pairs, failed=()):
    reasons = [{"label": label, "reason": "loss is nan"} for label in failed]
    return {"format_version": 1, "chains": chains, "pairs": pairs, "failed": reasons}


def test_tables_fit_and_say_what_is_missing():
    bare = pair(
        "seed10-k128", "seed11-k128", differs="both", size_a=1083, size_b=1084, pw_mcc=None, nulls={}, mmcs_ab=None
    )
    pairs = [pair(), bare]
    found = comparison(["seed0-k16", "seed1-k16", "seed10-k128"], pairs, failed=["seed1-k32"])
    text = tables.plain_text(tables.report([ROW, EMPTY], found))
    lines = text.splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    chain = next(line for line in lines if line.startswith("seed0-k16"))
    assert chain.split() == [
        "seed0-k16",
        "49>70>81>83",
        "0.83>0.90",
        "16.1",
        "10.4",
        "0.160",
        "0.944/0.905",
        "0.012",
        "12.3k",
        "done",
    ]
    first = next(line for line in lines if line.startswith("seed0-k16 ") and "83/84" in line)
    second = next(line for line in lines if line.startswith("seed10-k128 "))
    assert (
        first.split("  ")[0] == "seed0-k16"
        and "n/a (x3.1)" in first
        and "0.77" in first
        and "0.81" in first
        and "0.66" in first
    )
    assert "0.81" not in second and second.count("n/a") >= 5 and "1083/1084" in second
    assert "Compared: 3 of 4 chains; failed:" in text and "seed1-k32: loss is nan" in text


def test_both_ablations_and_both_sets_of_rows_are_shown(tmp_path):
    """Zero ablation alone flatters; so does FVU over the rows that were meant alone."""
    last = cycle_record(
        core_out=3,
        fvu=0.21,
        fvu_all_rows=0.64,
        rows_left_out=17,
        loss_recovered_zero=0.94,
        loss_recovered_mean=0.90,
    )
    (tmp_path / "cycle_00").mkdir()
    (tmp_path / "cycle_00" / "record.json").write_text(json.dumps(last))
    row = columns.chain_row("seed0-k16", tmp_path, 1)
    text = tables.plain_text(tables.chains_table([row]))
    assert "0.940/0.900" in text and "0.210/0.640" in text
    cells = columns.chain_columns([row])
    assert (cells["loss recovered"], cells["loss recovered (mean)"], cells["FVU (all rows)"]) == ([0.94], [0.9], [0.64])
    none_left = tables.plain_text(tables.chains_table([replace(row, fvu_all_rows=None)]))
    assert "0.210/" not in none_left and "0.210" in none_left


def test_the_largest_standard_error_of_all_chains_is_said_and_nothing_where_none_was_measured():
    small = {"fvu": 0.001, "kl": 0.02, "loss_recovered_zero": 0.003, "loss_recovered_mean": 0.004}
    words = columns.standard_error_words([small, None, {**small, "fvu": 0.0123, "kl": 0.01}])
    assert "FVU 0.012, loss recovered 0.003 (zero) and 0.004 (mean), KL 0.02;" in words
    rows = [columns.ChainRow("seed0-k16", "done", (3,), standard_errors=small), columns.ChainRow("seed1-k16", "done")]
    assert "at most: FVU 0.001," in tables.plain_text(tables.report(rows, None)).replace("\n", " ")
    assert columns.standard_error_words([None]) is None
    assert "Standard errors" not in tables.plain_text(tables.report(rows[1:], None))


def test_eight_cycles_and_long_labels_stay_readable():
    sizes = (1049, 1070, 1081, 1083, 1084, 1084, 1085, 1085)
    long = replace(ROW, label="seed12-k128", sizes=sizes, jaccard=(0.9,) * 7, l0=128.0, status="7 of 8 cycles")
    lines = tables.plain_text(tables.chains_table([long])).splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    assert any("1049>1070" in line and "seed12-k128" in line for line in lines)


def test_single_chain_is_not_available_rather_than_perfect():
    found = comparison(["seed0-k16"], [])
    text = tables.plain_text(tables.report([ROW], found))
    assert "not available" in text and "1.00" not in text.split("Pairs")[1]
    assert columns.summary(found) == {
        "chains": 1,
        "failed": 0,
        "pairs": 0,
        "covariance_available": 0,
        "matched_density_available": 0,
        "cycle0_available": 0,
        "matched_compute_available": 0,
    }


def test_markup_in_a_reason_is_printed_as_it_is():
    found = comparison([], [], failed=["a"])
    found["failed"][0]["reason"] = "[Errno 28] No space [/bold]"
    assert "a: [Errno 28] No space [/bold]" in tables.plain_text(tables.report([], found))


def test_summary_counts_only_nulls_that_exist():
    numbers = columns.summary(comparison(["a", "b", "c"], [pair(), pair(pw_mcc=0.2), pair(pw_mcc=None)]))
    assert numbers["pw_mcc_mean"] == pytest.approx(0.485) and numbers["pw_mcc_min"] == 0.2
    assert numbers["share_above_covariance"] == 0.5 and numbers["covariance_available"] == 2
    assert "share_above_matched_density" not in numbers


def test_report_is_written_whole(tmp_path):
    tables.write_report(tmp_path / "report.txt", tables.chains_table([ROW]), "where: /a/b")
    assert "49>70>81>83" in (tmp_path / "report.txt").read_text() and len(list(tmp_path.iterdir())) == 1


def test_chain_row_reads_the_folder(tmp_path):
    assert columns.chain_row("x", tmp_path / "missing", 2) == replace(EMPTY, label="x")
    for cycle in range(2):
        (tmp_path / f"cycle_{cycle:02d}").mkdir()
        record = cycle_record(cycle=cycle, core_out=5 + cycle, l0=16.0, fvu=0.25, jaccard=0.8 if cycle else None)
        (tmp_path / f"cycle_{cycle:02d}" / "record.json").write_text(json.dumps(record))
    row = columns.chain_row("x", tmp_path, 4)
    assert (row.sizes, row.jaccard, row.l0, row.fvu, row.status) == ((5, 6), (0.8,), 16.0, 0.25, "2 of 4 cycles")
    assert columns.chain_row("x", tmp_path, 4, "running").status == "running"
    (tmp_path / "failed.json").write_text(
        json.dumps({"kind": "data", "cycle": 2, "step": 1, "reason": "r", "generation": 1})
    )
    assert columns.chain_row("x", tmp_path, 4).status == "failed"
    assert columns.chain_row("x", tmp_path, 2).status == "done"


@pytest.mark.parametrize("n", [0, 1, 3, 13])
def test_figures_draw_for_any_number_of_chains(n, tmp_path):
    labels = [f"seed{i}-k16" for i in range(n)]
    found = comparison(labels, [pair(a, b) for i, a in enumerate(labels) for b in labels[:i]], failed=["seed99-k16"])
    names, matrix, nulls = figures.matrices(found)
    assert all(matrix[i][i] is None for i in range(n)) and (n < 2 or matrix[0][1] == matrix[1][0] == 0.77)
    figure = figures.consistency_matrix(names, matrix, nulls, ["seed99-k16"])
    figures.save(figure, tmp_path / "consistency.png")
    assert (tmp_path / "consistency.png").read_bytes().startswith(b"\x89PNG")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert ("0.77" in texts) == (n >= 2) and ("p99 0.31" in texts) == (n == 3)


def test_a_matrix_of_one_arm():
    labels = ["seed0-k16", "seed1-k16", "seed0-k16-random"]
    found = comparison(labels, [pair(), pair(b="seed0-k16-random", pw_mcc=0.1)]) | {
        "arms": dict(zip(labels, ("base", "base", "random"), strict=True))
    }
    assert figures.matrices(found, "base")[:2] == (labels[:2], [[None, 0.77], [0.77, None]])
    assert figures.matrices(found)[1][0] == [None, 0.77, 0.1] and figures.matrices(found, "random")[1] == [[None]]


@pytest.mark.parametrize("n", [0, 5])
def test_core_sizes_draw(n, tmp_path):
    figures.save(figures.core_sizes([ROW] * n + [EMPTY]), tmp_path / "sizes.png")


def test_format_status():
    line = format_status(
        {
            "label": "seed0-k16",
            "cycle": 1,
            "cycles": 4,
            "phase": "train",
            "step": 120,
            "steps": 320,
            "tokens_per_s": 12345.0,
            "fraction": 0.345,
            "eta_s": 130.0,
            "message": None,
        }
    )
    for part in (
        "seed0-k16 ",
        " cycle 1/3 ",
        " train ",
        " [#####-----------]  34% ",
        " step 120/320 ",
        " 12.3k tokens/s ",
        " ETA 2m10s",
    ):
        assert part in line
    assert "ETA" not in format_status({"label": "a", "phase": "failed", "message": "loss is nan\nmore", "eta_s": 3.0})
    assert format_status({"label": "a"}).split() == ["a", "queued"]
    assert [duration(s) for s in (0.2, 59, 61, 3700)] == ["0s", "59s", "1m01s", "1h01m"]


def test_board_keeps_order_and_refuses_unknown_fields():
    board = ProgressBoard(["b", "a"], cycles=2)
    board.update("a", phase="train", cycle=1)
    snapshot = board.snapshot()
    assert list(snapshot) == ["b", "a"] and snapshot["a"]["cycles"] == 2 and snapshot["b"]["phase"] == "queued"
    snapshot["a"]["phase"] = "done"
    assert board.snapshot()["a"]["phase"] == "train"
    with pytest.raises(AssertionError):
        board.update("a", tokens_per_second=1)


class Stages:
    """Statuses that change with each look; `seen` is set when all have been looked at."""

    def __init__(self, board, stages):
        self.board, self.stages, self.seen = board, iter(stages), threading.Event()

    def __call__(self):
        fields = next(self.stages, None)
        if fields is None:
            self.seen.set()
        else:
            self.board.update("seed0-k16", **fields)
        return self.board.snapshot()


def test_plain_lines_only_on_change_and_the_last_state():
    board, stream = ProgressBoard(["seed0-k16", "seed1-k16"], cycles=2), io.StringIO()
    stages = Stages(
        board,
        [
            {"phase": "train", "step": 1},
            {"step": 2},
            {"step": 3},
            {"phase": "attribute"},
            {"cycle": 1, "phase": "train", "step": 0},
        ],
    )
    with LiveLines(stages, stream=stream, interval_s=0.005):
        assert stages.seen.wait(300)
        board.update("seed0-k16", phase="train", step=7, steps=9)
    lines = stream.getvalue().splitlines()
    states = [" ".join(line.split()[3:5]) for line in lines if "seed0" in line]
    assert states == ["0/1 train", "0/1 attribute", "1/1 train", "1/1 train"]
    assert "step 7/9" in lines[-1]
    assert len([line for line in lines if "seed1" in line]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "live-lines"]


def test_a_phase_tells_its_rate_as_soon_as_it_is_known():
    board, stream = ProgressBoard(["seed0-k16"], cycles=1), io.StringIO()
    phases = [
        {"phase": phase, "tokens_per_s": rate, "eta_s": 7}
        for phase in ("evaluate", "attribute")
        for rate in (None, 4321.0, 4400.0)
    ]
    stages = Stages(board, phases)
    with LiveLines(stages, stream=stream, interval_s=0.005):
        assert stages.seen.wait(300)
    lines = [line for line in stream.getvalue().splitlines() if "evaluate" in line]
    assert len(lines) == 2 and "tokens/s" not in lines[0] and "4.3k tokens/s  ETA 7s" in lines[1]
    assert [line.count("tokens/s") for line in stream.getvalue().splitlines() if "attribute" in line][:2] == [0, 1]


def test_plain_lines_break_a_long_silence():
    board, stream = ProgressBoard(["seed0-k16"], cycles=1), io.StringIO()
    stages = Stages(board, [{"phase": "train", "step": step} for step in range(20)])
    with LiveLines(stages, stream=stream, interval_s=0.005, quiet_s=0.02):
        assert stages.seen.wait(300)
    assert len(stream.getvalue().splitlines()) > 2


def test_terminal_gets_redrawn_lines():
    board, stream = ProgressBoard(["seed0-k16"], cycles=1), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with LiveLines(board.snapshot, console=console, interval_s=0.01):
        board.update("seed0-k16", phase="done")
    assert "\x1b[" in stream.getvalue() and "done" in stream.getvalue() and "100%" in stream.getvalue()

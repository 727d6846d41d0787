"""Every view of a realistic sweep: what stands on the page is what stands in the artifacts."""

from __future__ import annotations

import numpy as np
import pytest
from dom import choose, number, table, traces, value
from playwright.sync_api import expect

VIEWS = ("summary", "consistency", "consensus", "cores", "coverage", "quality", "density", "features")


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_whole(sweep, view):
    page = sweep.go(view)
    expect(page.locator(".view.current")).to_have_count(1)
    expect(page.locator(f"#view-{view} h2")).to_be_visible()
    expect(page.locator(f'nav a[href="#{view}"]')).to_have_attribute("aria-current", "page")
    current = page.locator(".view.current")
    assert current.locator(".note").all_inner_texts() == [], "a note stands where something is missing; nothing is"
    assert current.locator(".plot.none").count() == 0
    for plot in current.locator(".plot").all():
        assert plot.evaluate("(plot) => plot.data.length") > 0
        assert plot.evaluate("(plot) => plot.querySelectorAll('.trace, .hm').length") > 0, "a chart without marks"
        assert plot.get_attribute("aria-label")
    for rows in current.locator("tbody").all():
        assert rows.locator("tr").count() > 0


def test_summary(sweep, artifact):
    page = sweep.go("summary")
    rows, comparison, expected = (
        artifact("evaluation")["rows"],
        artifact("comparison"),
        artifact("expectations")["expectations"],
    )
    assert value(page, "#card-chains strong") == len({row["chain"] for row in rows})
    assert value(page, "#card-agreement strong") == comparison["summary"]["groups"]["base/seed"]["pw_mcc"]["mean"]
    excess = comparison["summary"]["groups"]["base/seed"]["nulls"]["matched_compute"]["excess"]["pw_mcc"]["mean"]
    said = page.locator("#card-agreement").inner_text()
    assert f"Against as many of plain SAEs on a whole chain's tokens: {excess:+.3f}" in said
    assert value(page, "#card-consensus strong") == artifact("consensus")["core_size"]
    shown = table(page, "table-expectations")
    assert [row["Claim"] for row in shown] == [row["claim"] for row in expected]
    assert [number(row["Value"]) for row in shown] == [row["value"] for row in expected]
    assert [number(row["Bound"]) for row in shown] == [row["bound"] for row in expected]
    outcomes = page.locator("#table-expectations tbody td:nth-child(2)").all_inner_texts()
    assert outcomes == ["✓ hit", "✗ miss, by means alone", "○ open", "– not available"]
    assert [row["Low and high are"] for row in shown] == [
        "95 % interval of the difference",
        "means only",
        "95 % interval",
        "–",
    ]
    assert [[number(row["Low"]), number(row["High"])] for row in shown] == [
        row["interval"] or [None, None] for row in expected
    ]
    assert [row["Chain"] for row in table(page, "table-failed")] == [row["label"] for row in comparison["failed"]]
    assert page.locator("#table-failed").inner_text().count("<of 300>") == 1
    assert {row["Arm"]: int(row["Chains"]) for row in table(page, "table-arms")} == {
        arm: len({row["chain"] for row in rows if row["arm"] == arm}) for arm in {row["arm"] for row in rows}
    }
    assert "blocks.2.hook_resid_post" in page.locator("#facts").inner_text()


def test_consistency_table_is_the_comparison(sweep, artifact):
    page = sweep.go("consistency")
    pairs = artifact("comparison")["pairs"]
    shown = table(page, "table-pairs")
    assert len(shown) == len(pairs)
    by_chains = {(pair["a"], pair["b"]): pair for pair in pairs}  # another test may have sorted the table
    assert len(by_chains) == len(pairs)
    for row in shown:
        pair = by_chains.pop((row["Chain a"], row["Chain b"]))
        assert row["Differ in"] == pair["differs"]
        for name, field in (
            ("PW-MCC", "pw_mcc"),
            ("Overlap", "overlap"),
            ("Activation", "activation"),
            ("MMCS b to a", "mmcs_ba"),
        ):
            assert number(row[name]) == pair[field]
        for name, null, field in (
            ("Covariance p99", "covariance", "p99"),
            ("Density p99", "matched_density", "p99"),
            ("Cycle-0 sets", "cycle0", "mean"),
            ("Plain, as many tokens", "matched_compute", "mean"),
            ("of pairs", "matched_compute", "draws"),
        ):
            assert number(row[name]) == (pair["nulls"][null][field] if pair["nulls"][null]["available"] else None)
        chance = ("covariance", "matched_density")
        bars = [pair["nulls"][name]["p99"] for name in chance if pair["nulls"][name]["available"]]
        assert row["Beyond chance"] == ("yes" if all(pair["pw_mcc"] > bar for bar in bars) else "no")
        plain = pair["nulls"]["matched_compute"]
        above = "yes" if pair["pw_mcc"] > plain["mean"] else "no"
        assert row["Above plain"] == (above if plain["available"] else "")
    groups = artifact("comparison")["summary"]["groups"]
    scores = ("pw_mcc", "overlap", "activation")
    excess = [row for row in table(page, "table-groups") if "plain SAEs on as many tokens" in row["Measure"]]
    assert [float(row["Mean"]) for row in excess] == [
        group["nulls"]["matched_compute"]["excess"]["pw_mcc"]["mean"] for group in groups.values() if "nulls" in group
    ]
    measured = sum(name in group for group in groups.values() for name in scores)
    assert len(table(page, "table-groups")) == measured + len(excess)
    first = table(page, "table-groups")[0]
    group = groups[first["Group"]]["pw_mcc"]
    assert [float(first[name]) for name in ("Mean", "Low", "High")] == [group["mean"], *group["interval"]]


def test_consistency_matrix(sweep, artifact):
    page = sweep.go("consistency")
    pairs = [pair for pair in artifact("comparison")["pairs"] if (pair["arm_a"], pair["arm_b"]) == ("base", "base")]

    def cells() -> dict[tuple[str, str], float | None]:
        (heat,) = traces(page, "chart-matrix")
        return {
            (row, column): z
            for row, zs in zip(heat["y"], heat["z"], strict=True)
            for column, z in zip(heat["x"], zs, strict=True)
        }

    found = cells()
    assert len(found) == 64 and sum(z is None for z in found.values()) == 8, "a chain is not compared with itself"
    for pair in pairs:
        assert found[pair["a"], pair["b"]] == found[pair["b"], pair["a"]] == pair["pw_mcc"]
    choose(page, "chart-matrix", Measure="MMCS")
    for pair in pairs:
        assert (cells()[pair["a"], pair["b"]], cells()[pair["b"], pair["a"]]) == (pair["mmcs_ab"], pair["mmcs_ba"])
    choose(page, "chart-matrix", Measure="PW-MCC", Show="minus matched-density null")
    found = cells()
    for pair in pairs:
        null = pair["nulls"]["matched_density"]
        assert found[pair["a"], pair["b"]] == (
            pytest.approx(pair["pw_mcc"] - null["p99"], abs=1e-15) if null["available"] else None
        )
    choose(page, "chart-matrix", Measure="activation", Show="minus cycle-0 sets")
    assert "No pair has the cycle-0 sets of activation" in page.locator("#chart-matrix").inner_text()
    assert page.locator("#chart-matrix svg").count() == 0, "no empty chart beside the reason"
    choose(page, "chart-matrix", Arm="all arms", Measure="overlap", Show="value")
    assert len(cells()) == 16**2
    hover = traces(page, "chart-matrix")[0]["text"][0][1]
    assert "covariance null: mean" in hover and "cores of" in hover


def test_consensus(sweep, artifact):
    page = sweep.go("consensus")
    consensus = artifact("consensus")
    inside, outside, _ = traces(page, "chart-consensus")
    assert [a + b for a, b in zip(inside["y"], outside["y"], strict=True)] == [
        sum(group["in_seeds"] == number for group in consensus["groups"]) for number in (1, 2, 3, 4)
    ]
    assert sum(inside["y"]) == consensus["core_size"]
    together = [group for group in consensus["groups"] if len(group["members"]) > 1]
    shown = table(page, "table-consensus")
    assert [row["Feature"] for row in shown] == [group["id"] for group in together]
    assert [float(row["Cosine"]) for row in shown] == [group["cosine"] for group in together]
    assert [float(row["Smallest cosine"]) for row in shown] == [group["smallest_cosine"] for group in together]
    assert [float(row["Reproducibility"]) for row in shown] == [(group["in_seeds"] - 1) / 3 for group in together]
    assert [[float(row["Low"]), float(row["High"])] for row in shown] == [group["interval"] for group in together]
    assert [float(row["Density"]) for row in shown] == [group["density"] for group in together]
    shown = table(page, "table-rediscovery")
    sets = ("consensus", "cycle0_consensus", "free_consensus", "matched_consensus", "cores", "matched")
    assert len(shown) == len(sets) * len(consensus["rediscovery"])
    assert [float(row["Found"]) for row in shown[: len(sets)]] == [
        consensus["rediscovery"][0][name]["found"] for name in sets
    ]
    of_seed = [
        [row["cores"]["found"] for row in consensus["rediscovery"] if row["seed"] == seed] for seed in (10, 11, 12, 13)
    ]
    mean = np.mean([np.mean(values) for values in of_seed])
    assert float(table(page, "table-rediscovery-summary")[8]["Mean"]) == pytest.approx(mean, abs=1e-15)


def test_cores(sweep, artifact):
    page = sweep.go("cores")
    rows = list(artifact("evaluation")["rows"])
    assert len(table(page, "table-cores")) == len(rows)
    chain = [row for row in rows if row["chain"] == "seed1-k32"]
    jaccard = next(trace for trace in traces(page, "chart-jaccard") if trace["meta"] == "seed1-k32")
    assert (jaccard["x"], jaccard["y"]) == ([1, 2, 3], [row["jaccard"] for row in chain[1:]])
    drift = next(trace for trace in traces(page, "chart-drift") if trace["meta"] == "seed1-k32")
    assert drift["y"] == [row["decoder_drift"]["mean"] for row in chain[1:]]
    choose(page, "chart-drift", Show="gap closed")
    closed = next(trace for trace in traces(page, "chart-drift") if trace["meta"] == "seed1-k32")
    assert closed["y"] == [row["decoder_drift"]["gap_closed"] for row in chain[1:]]
    base = [row for row in rows if row["arm"] == "base"]
    *_, totals = traces(page, "chart-origins")
    assert totals["y"] == pytest.approx(
        [np.mean([row["core_out"] for row in base if row["cycle"] == cycle]) for cycle in range(4)]
    )
    choose(page, "chart-origins", Chains="seed1-k32")
    *bars, totals = traces(page, "chart-origins")
    for bar in bars:
        origin = bar["name"].removeprefix("entered in cycle ")
        assert bar["y"] == [row["origins"].get(origin, 0) for row in chain]
    assert totals["y"] == [row["core_out"] for row in chain]
    choose(page, "chart-sizes", Arm="random")
    for chart in ("chart-sizes", "chart-jaccard", "chart-drift"):
        assert {trace["meta"] for trace in traces(page, chart)} == {
            row["chain"] for row in rows if row["arm"] == "random"
        }, "charts follow"


def test_coverage(sweep, artifact):
    page = sweep.go("coverage")
    last = [row for row in artifact("evaluation")["rows"] if row["last"]]
    curves = {trace["meta"]: trace for trace in traces(page, "chart-coverage") if trace["mode"] == "lines"}
    rings = {trace["meta"]: trace for trace in traces(page, "chart-coverage") if trace["mode"] == "markers"}
    base = {row["chain"]: row for row in last if row["arm"] == "base"}
    assert curves.keys() == rings.keys() == base.keys()
    for chain, row in base.items():
        assert [[x, y] for x, y in zip(curves[chain]["x"], curves[chain]["y"], strict=True)] == row["coverage_curve"]
        assert (rings[chain]["x"], rings[chain]["y"]) == ([row["core_out"]], [row["coverage"]])
    shown = {row["Chain"]: row for row in table(page, "table-coverage")}
    assert len(shown) == len(last)
    for row in last:
        assert number(shown[row["chain"]]["For 80 %"]) == next(
            (rank for rank, share in row["coverage_curve"] if share >= 0.8), None
        )


def test_quality(sweep, artifact):
    page = sweep.go("quality")
    assert (
        "Standard errors over the sequences evaluated, at most: FVU 0.01" in page.locator(".view.current").inner_text()
    )
    last = [row for row in artifact("evaluation")["rows"] if row["last"]]
    for chart, field in (
        ("fvu", "fvu"),
        ("kl", "kl"),
        ("l0", "l0"),
        ("loss-recovered-zero", "loss_recovered_zero"),
        ("loss-recovered-mean", "loss_recovered_mean"),
        ("dead-share", "dead_share"),
    ):
        drawn = {trace["meta"]: trace for trace in traces(page, f"chart-{chart}")}
        assert drawn.keys() == {row["arm"] for row in last}
        for arm, trace in drawn.items():
            for place, k in enumerate(trace["x"]):
                values = [row[field] for row in last if (row["arm"], row["k"]) == (arm, int(k))]
                assert trace["y"][place] == pytest.approx(np.mean(values), abs=1e-14)
                low, high = (
                    trace["y"][place] - trace["error_y"]["arrayminus"][place],
                    trace["y"][place] + trace["error_y"]["array"][place],
                )
                if len(values) < 4:
                    assert (low, high) == pytest.approx((min(values), max(values)), abs=1e-12), (
                        "below four seeds: their range"
                    )
                else:
                    mean = np.mean(values)
                    assert low < mean < high and mean - low == pytest.approx(high - mean), "an interval of the mean"
                    assert (low, high) != pytest.approx((min(values), max(values)), abs=1e-12)
    shown = table(page, "table-quality")
    found = {row["Chain"]: (float(row["FVU"]), float(row["KL"]), number(row["Explained by the core"])) for row in shown}
    assert len(shown) == len(last) and found == {
        row["chain"]: (row["fvu"], row["kl"], row["core_explained"]) for row in last
    }
    choose(page, "chart-arms", k="32", Measure="KL")
    points = {(trace["meta"]["arm"], trace["meta"]["of"]): trace["x"] for trace in traces(page, "chart-arms")}
    for arm in ("base", "random", "relu", "plain"):
        values = [row["kl"] for row in last if (row["arm"], row["k"]) == (arm, 32)]
        assert points[arm, "chains"] == values and points[arm, "mean"] == [pytest.approx(np.mean(values))]
    assert ("transfer", "mean") not in points, "it has no SAE at this k"
    choose(page, "chart-further", Measure="Free L0")
    plain = next(trace for trace in traces(page, "chart-further") if trace["meta"] == "plain")
    assert plain["y"][0] == pytest.approx(
        np.mean([row["free_l0"] for row in last if (row["arm"], row["k"]) == ("plain", 16)])
    )
    choose(page, "chart-prefixes", k="32", Measure="KL")
    base = next(trace for trace in traces(page, "chart-prefixes") if trace["meta"] == "base")
    rows = [row for row in last if (row["arm"], row["k"]) == ("base", 32)]
    assert base["x"] == ["core alone", *(f"to group {group}" for group in range(5))]
    assert base["y"] == pytest.approx([np.mean([row["prefixes"][place]["kl"] for row in rows]) for place in range(6)])
    plain = next(trace for trace in traces(page, "chart-prefixes") if trace["meta"] == "plain")
    assert "core alone" not in plain["x"], "a plain SAE has no core"


def test_density(sweep, artifact):
    page = sweep.go("density")
    last = [row for row in artifact("evaluation")["rows"] if row["last"]]
    base = [row["density_histogram"] for row in last if row["arm"] == "base"]
    core, free = traces(page, "chart-density")
    assert core["customdata"] == np.sum([histogram["core"] for histogram in base], axis=0).tolist()
    assert free["customdata"] == np.sum([histogram["free"] for histogram in base], axis=0).tolist()
    assert (sum(core["y"]), sum(free["y"])) == pytest.approx((1, 1))
    shown = table(page, "table-density")
    counts = {row["chain"]: [sum(row["density_histogram"][part]) for part in ("core", "free")] for row in last}
    assert {row["Chain"]: [int(row[f"{part}, counted"]) for part in ("Core", "Free")] for row in shown} == counts
    assert len(shown) == len(last)
    silent = {row["chain"]: row["density_histogram"]["silent"]["free"] for row in last}
    assert {row["Chain"]: int(row["Free, silent"]) for row in shown} == silent

"""What page, terminal and MLflow say of functional agreement: planted numbers, beyond chance or not."""

from __future__ import annotations

from dataclasses import asdict, replace

from dmsae_ray.compare.functional import Functional, FunctionalNull
from dmsae_ray.results.numbers import consistency_numbers
from dmsae_ray.show.mlflow.measurements import course_points
from dmsae_ray.show.page.views.functional_parts import functional_parts
from dmsae_ray.show.terminal.functional_lines import functional_lines

NULLS = {
    "permuted": FunctionalNull(True, None, 200, 0.1, 0.2, 0.0, 0.1, 0.0, 0.5),
    "matched_density": FunctionalNull(True, None, 20, 0.1, 0.3, 0.0, 0.1, subspace=0.2, subspace_bar=0.3),
    "covariance": FunctionalNull(True, None, 0, subspace=0.15, subspace_bar=0.2, subspace_draws=50),
    "cycle0": FunctionalNull(False, "nothing has been distilled yet", 1, 0.4, 0.4, 0.3, 0.3),
}
FOUND = Functional(9, 0.25, 0.1, 9, 0, 0.6, 8, 1, 500, None, None, 0.5, 4, 5, 0.05, NULLS)
SPREAD = {"mean": 0.5, "min": 0.4, "max": 0.6, "n": 6, "interval": [0.45, 0.55], "values": None}


def comparison(found: Functional | None = FOUND):
    pair = {
        "a": "x",
        "b": "y",
        "group": "base/seed",
        "k_a": 8,
        "k_b": 8,
        "pw_mcc": 0.5,
        "overlap": 0.5,
        "activation": 0.5,
    }
    point = {"tokens": 1000, "pairs": 6, "pw_mcc": SPREAD, "pw_mcc_chance": SPREAD | {"mean": 0.2}, "firing": None}
    group = {
        "scored": 6,
        "functional": {
            "firing": SPREAD,
            "effect": None,
            "beyond": {"firing": 0.75},
            "nulls": {name: {"firing": SPREAD | {"mean": 0.1}} for name in NULLS},
        },
        "course": {"0": point, "1": point | {"tokens": 2000, "pw_mcc": SPREAD | {"mean": 0.7, "interval": None}}},
    }
    return {
        "pairs": [pair | {"functional": None if found is None else asdict(found)}],
        "summary": {"groups": {"base/seed": group, "base~random/arm": group}},
    }


def rows(table):
    return {
        dict(zip([c.name for c in table.columns], cells, strict=True))["Measure"]: dict(
            zip([c.name for c in table.columns], cells, strict=True)
        )
        for row in table.rows
        for cells in [[column.value(row) for column in table.columns]]
    }


def test_a_pair_s_verdicts():
    assert {name: FOUND.beyond(name) for name in ("firing", "effect", "importance", "subspace")} == {
        "firing": False,  # above the permuted bar, below that of free latents as dense
        "effect": True,
        "importance": None,
        "subspace": True,
    }
    _, _, table = functional_parts(comparison())
    shown = rows(table)
    assert [shown[name]["Beyond chance"] for name in shown] == [False, True, None, True]
    assert (shown["firing overlap"]["Agreement"], shown["firing overlap"]["Free, as dense"]) == (0.25, 0.3)
    assert shown["firing overlap"]["Cycle-0 sets"] is None and "nothing has been distilled yet" in table.html()
    assert (
        shown["unmatched subspace"]["Latents"] == "4 and 5" and shown["unmatched subspace"]["Permuted or random"] == 0.2
    )
    unmeasured = replace(FOUND, effect=None, effect_rows=0, effect_pairs=0)
    assert "gradients of the loss were not measured" in functional_parts(comparison(unmeasured))[2].html()


def test_groups_and_course():
    chart, table, _ = functional_parts(comparison())
    (found,) = rows(table).values()
    assert (found["Mean"], found["Low"], found["Permuted or random"], found["Beyond chance"]) == (0.5, 0.45, 0.1, 0.75)
    line, chance = chart.figures["PW-MCC, whole cores",].data
    assert (line.x, line.y, line.error_y.array) == ((1000, 2000), (0.5, 0.7), (0.55 - 0.5, 0.0))
    assert chance.y == (0.2, 0.2) and isinstance(chart.figures["firing overlap, whole cores",], str)
    assert functional_parts({"pairs": [], "summary": {"groups": {}}}) == []
    assert len(functional_parts(comparison(None))) == 2, "no pair has such numbers"


def test_terminal_mlflow_and_names():
    assert functional_lines(comparison()["summary"]["groups"]).plain == (
        "Used alike, base/seed (by chance): firing overlap 0.50 (0.10)."
    )
    assert functional_lines({}) is None
    points = list(course_points(comparison(), 1))
    assert [(p.key, p.step, p.value) for p in points if p.key.startswith("course/base.seed.pw_mcc")][:3:2] == [
        ("course/base.seed.pw_mcc", 0, 0.5),
        ("course/base.seed.pw_mcc", 1, 0.7),
    ]
    numbers = consistency_numbers(comparison())
    assert numbers["consistency.base.seed.course.1.pw_mcc"] == 0.7
    assert numbers["consistency.base.seed.k8.functional.effect"] == 0.6
    assert numbers["consistency.base.seed.functional.beyond.firing"] == 0.75

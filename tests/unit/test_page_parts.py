"""The parts of a sweep's page that need no browser: numbers, spreads, what is read, and what is refused."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from dmsae_ray.track.page import write_page
from dmsae_ray.track.page.arms import Style, words
from dmsae_ray.track.page.consistency import beyond_chance
from dmsae_ray.track.page.coverage import rank_at
from dmsae_ray.track.page.density import median, pooled
from dmsae_ray.track.page.document import embedded
from dmsae_ray.track.page.numerals import shown, whole
from dmsae_ray.track.page.spread import over_seeds
from dmsae_ray.track.page.table import Column, Table

ROW = {"chain": "seed0-k16", "arm": "base", "stage": "distill", "seed": 0, "k": 16, "cycle": 0, "last": True, "from": None}


def folder(tmp_path, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "kind", "seen"),
    [
        (0.5633628, "share", "0.563"), (-0.0004, "signed", "-0.000"), (24693, "count", "24,693"), (15.7914, "tenths", "15.8"),
        (0.0123, "percent", "1.2 %"), (1.0, "percent", "100 %"), (0.000004, "percent", "0.00040 %"), (0.34683, "nats", "0.347"),
        (3.183207, "nats", "3.18"), (0.0000123, "nats", "1.23e-05"), (0.0, "nats", "0"), (12345.6, "nats", "12,346"),
        (None, "share", "n/a"), (math.nan, "nats", "n/a"), (None, "text", "–"), ([0, 1], "text", "0, 1"), (True, "yes_no", "yes"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_sensible_digits(value, kind, seen):
    assert shown(value, kind) == seen


def test_the_whole_value_loses_no_digit():
    for value in (0.1 + 0.2, 1e-17, 3.1832072953525543, 7):
        assert float(whole(value)) == value
    assert (whole(None), whole(False)) == ("", "no")


def test_a_spread_counts_seeds_not_chains():
    spread = over_seeds([(0, 1.0), (0, 3.0), (1, 10.0), (2, None), (3, math.nan)])
    assert (spread.mean, spread.low, spread.high, spread.seeds, spread.chains) == (6.0, 2.0, 10.0, 2, 3)
    assert spread.words() == "range over 2 seeds"
    assert over_seeds([(0, 1.0), (0, 2.0)]).words() == "one seed"
    assert over_seeds([(0, None)]) is None


def test_four_seeds_have_an_interval_of_the_mean():
    rng = np.random.default_rng(0)
    values = [(seed, float(rng.normal())) for seed in range(40)]
    spread = over_seeds(values)
    numbers = np.array([value for _, value in values])
    error = 1.96 * numbers.std() / math.sqrt(len(numbers))
    assert spread.words() == "95 % interval over 40 seeds"
    assert (spread.mean - spread.low, spread.high - spread.mean) == pytest.approx((error, error), rel=0.15)
    assert over_seeds(values) == spread, "the same folder makes the same page"
    assert over_seeds([(seed, 2.0) for seed in range(4)]).low == pytest.approx(2.0)


def test_arms_that_share_a_colour_share_nothing_else():
    styles = [Style.number(place) for place in range(30)]
    for place, one in enumerate(styles):
        for other in styles[:place]:
            if one.colour == other.colour:
                assert one.symbol != other.symbol and one.dash != other.dash
    assert len(set(styles)) == 30


def test_an_arm_is_described_by_its_fields_not_its_name():
    arms = {
        "random": {"fields": {"selection.by": "norm", "train.lr": 0.1}, "cycles": None, "core": "none"},
        "moved": {"fields": {}, "cycles": 1, "core": "distilled"},
    }
    config = {"selection": {"by": "attribution"}, "study": {"arms": arms}}
    assert words("base", config) == "the grid: core chosen by attribution"
    assert words("random", config) == "core chosen by the norm of encoder rows; train.lr = 0.1"
    assert words("moved", config) == "new SAEs on cores: distilled; 1 cycle"
    assert words("elsewhere", config) == "–" and words("base", {}) == "the grid"


def pair(pw_mcc, **p99):
    return {"pw_mcc": pw_mcc, "nulls": {name: {"available": bar is not None, "p99": bar} for name, bar in p99.items()}}


def test_beyond_chance_is_beyond_every_null_that_is_available():
    assert beyond_chance(pair(0.5, covariance=0.3, matched_density=0.4, cycle0=0.9)) is True
    assert beyond_chance(pair(0.5, covariance=0.3, matched_density=0.5)) is False
    assert beyond_chance(pair(0.5, covariance=0.3, matched_density=None)) is True
    assert beyond_chance(pair(0.5, covariance=None, matched_density=None)) is None
    assert beyond_chance(pair(None, covariance=0.3)) is None


def test_rank_at():
    curve = [[1, 0.2], [2, 0.5], [10, 0.9]]
    assert [rank_at(curve, share) for share in (0.1, 0.5, 0.8, 0.95)] == [1, 2, 10, None]


def test_histogram_medians_and_sums():
    edges = [-3.0, -2.0, -1.0, 0.0]
    assert median(edges, [0, 4, 0]) == pytest.approx(10**-1.5)
    assert median(edges, [2, 0, 2]) == pytest.approx(10**-2.0)
    assert median(edges, [0, 0, 0]) is None
    rows = [{"chain": str(i), "density_histogram": {"edges": edges, "core": [i, 0, 1], "free": [1, 2, 3]}} for i in range(3)]
    assert pooled(rows) == {"edges": edges, "core": [3, 0, 3], "free": [3, 6, 9]}
    rows[2]["density_histogram"]["edges"] = [-4.0, -2.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="density_histogram of 2 has other edges"):
        pooled(rows)


def test_embedded_json_cannot_end_its_element():
    value = {"texts": ["</script>", "<!--", "<script>", "\u2028 & ' \""]}
    text = embedded(value)
    assert "<" not in text and json.loads(text) == value


def test_table_cells_are_escaped_and_whole():
    columns = [Column("x", lambda row: row["x"]), Column("n", lambda row: row["n"], "share")]
    html = Table("t", "a < b", columns, [{"x": '<i>"', "n": 1 / 3}]).html()
    assert "<i>" not in html and "a &lt; b" in html and "&lt;i&gt;&quot;" in html
    assert f'data-value="{1 / 3!r}" title="{1 / 3!r}">0.333<' in html


def test_a_folder_without_evaluation_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.json is not there.*run the sweep"):
        write_page(tmp_path, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"evaluation": {"rows": [{"chain": "a"}]}}, r"evaluation\.json.*row 0 lacks arm, cycle, k, last, seed, stage"),
        ({"evaluation": {"rows": [ROW]}, "features": "{"}, r"features\.json is not JSON.*delete it"),
        ({"evaluation": {"rows": [ROW]}, "comparison": {"pairs": []}}, r"comparison\.json lacks chains, arms"),
        ({"evaluation": {"rows": [ROW]}, "config": "a: [b"}, r"config\.yaml is not YAML"),
        (
            {"evaluation": {"rows": [ROW | {"density_histogram": {"edges": [-1, 0], "core": [1, 2], "free": [1]}}]}},
            "density_histogram of seed0-k16 has 2 edges for 2 and 1 counts",
        ),
        (
            {"evaluation": {"rows": [ROW | {"density_histogram": {"edges": [0.1, 1], "core": [1], "free": [1]}}]}},
            "edges are log10 of shares",
        ),
    ],
)
def test_what_is_not_what_it_should_be_is_refused_by_name(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        write_page(folder(tmp_path, **files), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists() and not list(tmp_path.glob("*.tmp-*"))


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    write_page(folder(tmp_path, evaluation={"rows": [ROW]}), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # plotly's own text names addresses that it does not visit here
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#|data:)\w""", ours) and "url(" not in ours and "@import" not in ours
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy and "script-src 'sha256-" in policy

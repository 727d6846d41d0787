"""The parts of a sweep's page that need no browser: numbers, spreads, what is read, and what is refused."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scipy.stats import t

from dmsae_ray.show.page import write_page
from dmsae_ray.show.page.arm_style import Style, words
from dmsae_ray.show.page.chart import Chart, Choice, span
from dmsae_ray.show.page.document import embedded
from dmsae_ray.show.page.numerals import shown, whole
from dmsae_ray.show.page.spread import over_seeds
from dmsae_ray.show.page.table import Column, Table
from dmsae_ray.show.page.views.consistency import beyond_chance
from dmsae_ray.show.page.views.coverage import rank_at
from dmsae_ray.show.page.views.density import median, pooled

ROW = {
    "chain": "seed0-k16",
    "arm": "base",
    "stage": "distill",
    "seed": 0,
    "k": 16,
    "cycle": 0,
    "last": True,
    "from": None,
}


def folder(tmp_path, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "kind", "seen"),
    [
        (0.5633628, "share", "0.563"),
        (-0.0004, "signed", "-0.000"),
        (24693, "count", "24,693"),
        (15.7914, "tenths", "15.8"),
        (0.0123, "percent", "1.2 %"),
        (1.0, "percent", "100 %"),
        (0.000004, "percent", "0.00040 %"),
        (0.34683, "nats", "0.347"),
        (3.183207, "nats", "3.18"),
        (0.0000123, "nats", "1.23e-05"),
        (0.0, "nats", "0"),
        (12345.6, "nats", "12,346"),
        (None, "share", "n/a"),
        (math.nan, "nats", "n/a"),
        (None, "text", "–"),
        ([0, 1], "text", "0, 1"),
        (True, "yes_no", "yes"),
    ],
)
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
    error = t.ppf(0.975, 39) * numbers.std(ddof=1) / math.sqrt(40)
    assert spread.words() == "95 % interval over 40 seeds"
    assert (spread.mean - spread.low, spread.high - spread.mean) == pytest.approx((error, error))
    assert over_seeds(values) == spread, "the same folder makes the same page"
    equal = over_seeds([(seed, 2.0) for seed in range(4)])
    assert (equal.low, equal.high, equal.words()) == (2, 2, "range over 4 seeds"), "equal seeds say nothing of others"
    assert over_seeds([(seed, seed / 10) for seed in range(4)], (0.0, 1.0)).low == 0


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
    rows = [
        {"chain": str(i), "density_histogram": {"edges": edges, "core": [i, 0, 1], "free": [1, 2, 3]}} for i in range(3)
    ]
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


def test_a_folder_without_any_results_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results.*evaluation\.json, comparison\.json.*run the sweep"):
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
    ours = re.sub(
        r"<script>.*?</script>", "", page, flags=re.S
    )  # plotly's own text names addresses that it does not visit here
    assert (
        not re.search(r"""(?:src|href)\s*=\s*["']?(?!#|data:)\w""", ours)
        and "url(" not in ours
        and "@import" not in ours
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy and "script-src 'sha256-" in policy


def test_a_chart_answers_every_choice_and_one_option_is_no_choice():
    arms = Choice("Arm", ["base"])
    chart = Chart(
        "c",
        "Title",
        "How to read it.",
        {("base", "a"): "no a.", ("base", "b"): "no b."},
        [arms, Choice("Measure", ["a", "b"])],
    )
    assert chart.data() == {"a": "no a.", "b": "no b."}, (
        "asked for by what the page offers, and it offers no single arm"
    )
    assert chart.html().count("<select") == 1 and "Arm <b>base</b>" in chart.html()
    assert Chart("c", "Title", "", {("base",): "no."}, [arms]).data() == {"": "no."}
    with pytest.raises(AssertionError, match="c can be asked for"):
        Chart("c", "Title", "", {("base",): "keyed by an arm that cannot be chosen"})
    with pytest.raises(AssertionError, match="b"):
        Chart("c", "Title", "", {("a",): "b is forgotten"}, [Choice("Measure", ["a", "b"])])


@pytest.mark.parametrize(
    ("values", "least", "most", "low", "high"),
    [
        ([0.183, 0.184], 0.02, 1.0, 0.17, 0.20),
        ([1.0, 1.0], 0.1, 1.0, 0.88, 1.01),
        ([0.0], 0.1, 1.0, -0.01, 0.11),
        ([15.7, 31.7], 0.6, None, 14, 33),
        ([27], 8, None, 22, 32),
        ([0.1, 1.3], 0.1, 1.0, -0.1, 1.4),
        ([-0.4, 0.9], 0.1, 1.0, -0.6, 1.11),
    ],
)
def test_an_axis_holds_its_values_and_is_not_stretched_around_one(values, least, most, low, high):
    start, end = span(values, least, most)
    assert low <= start < min(values) and max(values) < end <= high and end - start >= least


def test_a_single_seed_has_no_ends():
    assert over_seeds([(0, 0.389), (0, 0.4)]).ends == (None, None)
    assert over_seeds([(0, 1.0), (1, 2.0)]).ends == (1.0, 2.0)


def single_arm(tmp_path, **more):
    rows = [
        ROW
        | {
            "seed": seed,
            "chain": f"seed{seed}-k16",
            "core_out": 30,
            "loss_recovered_zero": 0.94,
            "loss_recovered_mean": 0.9,
        }
        for seed in (0, 1)
    ]
    return folder(tmp_path, **({"evaluation": {"rows": rows}} | more))


def written(folder):
    write_page(folder, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8").split('<script type="application/json"')[0]


def test_headlines_state_no_interval_of_one_value_and_the_more_sober_loss_recovered(tmp_path):
    page = written(single_arm(tmp_path))
    assert "30.0 in each of 2 seeds" in page and not re.search(r"(\d[\d.,]*) to \1[^\d.]", page)
    card = re.search(r'id="card-loss".*?</li>', page).group()
    assert 'data-value="0.9"' in card and "setting the stream to its mean" in card and "to zero: 0.940" in card


def test_what_could_not_be_made_is_said_first_and_in_its_place(tmp_path):
    parts = [{"part": "features", "reason": "OutOfMemoryError: 84 GiB <asked for>"}]
    page = written(single_arm(tmp_path, failed_parts=parts))
    assert page.index('id="banner-failed-parts"') < page.index('class="cards"') and "&lt;asked for&gt;" in page
    assert "There are no features to look at: it could not be made (OutOfMemoryError" in page
    (tmp_path / "failed_parts.json").write_text("[]")
    assert "banner-failed-parts" not in written(tmp_path)


def test_rows_that_decide_too_much_are_shown_with_their_figures(tmp_path):
    outliers = {
        "multiple": 10.0,
        "rows": 17,
        "of_rows": 73728,
        "share_of_variance": 0.613,
        "largest": 26800.0,
        "median": 140.2,
    }
    data = {
        "hook": "h",
        "rows": 73728,
        "norm_quantiles": {"0.5": 140.2, "0.99": 171.9},
        "outlier_norm": None,
        "dropped": 0,
    }
    page = written(
        single_arm(tmp_path, data=data | {"outliers": outliers, "warning": "17 rows hold 61 % of the variance"})
    )
    assert 'id="banner-data-warning"' in page and page.index("hold 61 % of the variance") < page.index('class="cards"')
    facts = re.search(r'id="rows".*?</dl>', page).group()
    assert all(words in facts for words in ("17 of 73,728", "61 %", "26,800", "99 % quantile", "no row is dropped")), (
        facts
    )
    page = written(
        single_arm(tmp_path, data=data | {"outlier_norm": 10, "warning": None, "outliers": None, "more": [1]})
    )
    assert "banner-data-warning" not in page and "10 times the median norm" in page


@pytest.mark.parametrize("only", ["comparison", "consensus", "features", "expectations", "failed_parts"])
def test_any_one_piece_alone_makes_a_page(tmp_path, only):
    content = {
        "comparison": {"chains": ["a", "b"], "arms": {"a": "base", "b": "base"}, "pairs": [], "failed": []},
        "consensus": {"groups": []},
        "features": {"features": []},
        "expectations": {"expectations": []},
        "failed_parts": [{"part": "evaluation", "reason": "disk full"}],
    }[only]
    page = written(folder(tmp_path, **{only: content}))
    assert page.count('class="view"') == 8
    assert ("it could not be made (disk full)" if only == "failed_parts" else "evaluation.json is not there") in page


def test_a_secret_in_a_source_is_not_shown(tmp_path):
    config = "corpus: {source: 's3://me:tomsSecret@bucket/text?access_key=alsoSecret&region=eu'}"
    page = written(single_arm(tmp_path, config=config))
    assert "s3://***@bucket/text" in page and "Secret" not in page

"""The configuration: what it accepts, what it refuses and how it says so, and what names a folder."""

import subprocess
from pathlib import Path

import pytest
from readme import README, submit_lines

from dmsae_ray.config import Config, CorpusPart
from dmsae_ray.driver.help import MATTER, sections
from dmsae_ray.driver.options import HarvestCommand, SweepCommand, load
from dmsae_ray.identity import chain_fields, dataset_fields, fields_key

CONFIGS = Path(__file__).parents[2] / "configs"


def refused(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        load(SweepCommand, list(argv))
    return str(error.value)


def test_default_needs_no_arguments():
    config = load(SweepCommand, [])
    assert config.name == "quickstart"
    assert len(config.sweep.seeds) >= 2 and len(config.sweep.k) >= 2
    assert config.sweep.cycles >= 4 and config.sae.width >= 2048 and config.train.tokens >= 300_000


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path):
    config = load(SweepCommand, ["--config", str(path)])
    assert config.name == path.stem.replace("_", "-")


def test_paper_reading_takes_the_source_s_reading_of_the_open_decisions():
    paper = load(SweepCommand, ["--config", str(CONFIGS / "gemma2_2b_l12_65k_paper_reading.yaml")])
    ours = load(SweepCommand, ["--config", str(CONFIGS / "gemma2_2b_l12_65k.yaml")])
    assert (paper.sae.core_gate, paper.sae.core_budget, paper.sae.core_decoder_init) == ("relu", "counted", "random")
    changes = {"core_gate": "batchtopk", "core_decoder_init": "encoder"}
    assert paper.sae.model_copy(update=changes) == ours.sae
    assert paper.train == ours.train and paper.harvest == ours.harvest and paper.sweep == ours.sweep


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain:\n  lr: 0.001\n  batch: 512\nsweep:\n  k: [8]\n")
    config = load(SweepCommand, ["--config", str(path), "--train.lr", "0.002", "--sweep.seeds", "3,4"])
    assert (config.train.lr, config.train.batch, config.sweep.k, config.sweep.seeds) == (0.002, 512, (8,), (3, 4))


def test_a_mapping_on_the_command_line_takes_the_place_of_the_file_s(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sweep: {cycles: 3}\nstudy: {arms: {one: {cycles: 1}, two: {cycles: 2}}}\n")
    file = ["--config", str(path)]
    assert load(SweepCommand, [*file, "--study.arms", "{}"]).study.arms == {}
    assert list(load(SweepCommand, [*file, "--study.arms", '{"three": {"cycles": 1}}']).study.arms) == ["three"]
    beside = load(SweepCommand, [*file, "--sweep.k", "8"])  # other fields of a section stay the file's
    assert list(beside.study.arms) == ["one", "two"] and (beside.sweep.k, beside.sweep.cycles) == ((8,), 3)


def test_what_one_command_line_says_the_next_one_does_not():
    assert load(SweepCommand, ["--verbose", "--sae.width", "512"]).verbose
    refused("--train.learning_rate", "0.1")
    assert load(SweepCommand, []) == load(SweepCommand, ["--sae.width", str(load(SweepCommand, []).sae.width)])
    assert not load(SweepCommand, []).verbose and load(SweepCommand, []).sae.width != 512


def test_of_a_flag_given_twice_the_last_counts():
    """So a script's flags can be overridden by what is put behind them."""
    assert load(SweepCommand, ["--sae.width", "512", "--name", "x", "--sae.width=1024"]).sae.width == 1024


def test_a_mixture_is_read_from_the_file_and_from_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "corpus:\n  mixture:\n  - {source: a.txt, weight: 2}\n  - {source: owner/name, weight: 0.5, text_field: "
        "body, revision: v1}\n"
    )
    parts = (
        CorpusPart(source="a.txt", weight=2),
        CorpusPart(source="owner/name", weight=0.5, text_field="body", revision="v1"),
    )
    assert load(SweepCommand, ["--config", str(path)]).corpus.parts == parts
    in_json = (
        '[{"source": "a.txt", "weight": 2}, {"source": "owner/name", "weight": 0.5, "text_field": "body", '
        '"revision": "v1"}]'
    )
    assert load(SweepCommand, ["--corpus.mixture", in_json]).corpus.parts == parts
    one = CorpusPart(source="b", weight=1)
    assert load(
        SweepCommand, ["--config", str(path), "--corpus.mixture", '[{"source": "b", "weight": 1}]']
    ).corpus.parts == (one,)
    single = load(SweepCommand, ["--corpus.source", "b", "--corpus.text_field", "body"]).corpus
    assert single.mixture == () and single.parts == (CorpusPart(source="b", weight=1, text_field="body"),)


def test_a_dataset_s_key_depends_on_what_decides_its_text():
    def key(*argv, corpus="fingerprint"):
        return fields_key(dataset_fields(load(SweepCommand, list(argv)), "model", corpus))

    same = key()
    for argv in (
        ["--corpus.documents", "9"],
        ["--corpus.attribution_share", "0.1"],
        ["--corpus.evaluation_share", "0.1"],
        ["--corpus.packing", "concatenate"],
    ):
        assert key(*argv) != same, argv
    assert key(corpus="other") != same
    # Sources are in the fingerprint: a file that has moved is the same text.
    assert key("--corpus.source", "a") == key("--corpus.mixture", '[{"source": "b", "weight": 1}]') == same


def test_the_readme_s_lines_for_a_cluster_are_commands_of_this_version(monkeypatch):
    """tests/cluster/test_users.py types them for good."""
    say = """ray() { shift 5; printf '%s\\0' "$@"; echo; }; python() { printf '%s\\0' python "$@"; echo; }\n"""
    told = subprocess.run(
        ["bash", "-euc", say + submit_lines()], env={"OUTPUT": "s3://b/x?a=1&b=2"}, capture_output=True, check=True
    ).stdout.decode()
    monkeypatch.chdir(README.parent)
    submitted, status = (line.rstrip("\0").split("\0") for line in told.splitlines())
    assert submitted[:3] == status[:3] == ["python", "-m", "dmsae_ray.sweep"]
    sweep, look = (load(SweepCommand, argv[3:]) for argv in (submitted, status))
    assert sweep.output == look.output == "s3://b/x?a=1&b=2" and look.status and sweep.track.uri == "http://mlflow:5000"
    assert sweep.sections()["train"] == load(SweepCommand, []).train  # the quickstart's


def test_unknown_key_in_the_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  learning_rate: 0.001\n")
    message = refused("--config", str(path))
    assert str(path) in message and "train.learning_rate" in message and "no such field" in message


def test_unknown_flag_ends_the_command():
    with pytest.raises(
        ValueError,
        match=r"^command line: unrecognized arguments: --train\.learning_rate 0\.1 \(see --help for all fields\)$",
    ):
        load(SweepCommand, ["--train.learning_rate", "0.1"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--train.lr", "fast"], ["train.lr", "number", "'fast'"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "cannot be read"]),
        (["--sweep.k", "4096"], ["sweep.k 4096", "train.batch", "between 1 and 2048"]),
        (["--sae.width", "16"], ["sae.width 16", "first group", "widen"]),
        (["--attribution.tau", "1.5"], ["attribution.tau", "less than or equal to 1"]),
        (["--attribution.tau", "0"], ["attribution.tau", "greater than 0"]),
        (["--attribution.quantile", "0.8"], ["attribution.quantile", "only with attribution.aggregator quantile"]),
        (
            ["--attribution.candidates", "all", "--selection.by", "reconstruction", "--selection.size", "0.5"],
            ["selection.by reconstruction", "attribution.candidates to first_group"],
        ),
        (["--attribution.until_jaccard", "1.5"], ["attribution.until_jaccard", "less than or equal to 1"]),
        (["--train.lanes", "3"], ["train.lanes 3", "train.batch 1024"]),
        (["--cluster.workers", "3"], ["cluster.workers 3", "train.lanes 8"]),
        (["--harvest.rows_per_group", "1000"], ["harvest.rows_per_group 1000", "train.batch / train.lanes"]),
        (["--harvest.tokens", "100"], ["harvest.tokens 100", "one row group for each lane"]),
        (["--train.tokens", "100"], ["train.tokens 100", "less than one batch"]),
        (["--sweep.seeds", "1,1"], ["sweep.seeds", "twice"]),
        (["--sae.prefix_fractions", "0.5,0.6"], ["sae.prefix_fractions", "together below 1"]),
        (["--corpus.mixture", '[{"source": "a", "weight": 0}]'], ["corpus.mixture.0.weight", "greater than 0"]),
        (["--corpus.mixture", '[{"source": "a"}]'], ["corpus.mixture.0.weight", "required"]),
        (
            ["--corpus.mixture", '[{"source": "a", "weight": 1, "field": "x"}]'],
            ["corpus.mixture.0.field", "no such field"],
        ),
        (
            ["--corpus.source", "a", "--corpus.mixture", '[{"source": "b", "weight": 1}]'],
            ["corpus.mixture and corpus.source are both"],
        ),
        (
            ["--corpus.text_field", "a", "--corpus.mixture", '[{"source": "b", "weight": 1}]'],
            ["corpus.mixture and corpus.text_field"],
        ),
    ],
)
def test_a_mistake_is_named_with_its_field(argv, words):
    message = refused(*argv)
    for word in words:
        assert word in message, message


def test_several_mistakes_are_all_named():
    message = refused("--train.lanes", "3", "--sweep.k", "4096", "--sweep.data", "disjoint", "--sweep.seeds", "0,2")
    first, *lines = message.splitlines()
    assert first.endswith("(with the command line's overrides):") and all(
        line.startswith("  configuration: ") for line in lines
    )
    named = [line.removeprefix("  configuration: ").split()[0] for line in lines]
    assert named == ["sweep.k", "train.batch", "sweep.seeds"], "a line each, remedy included"


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        load(SweepCommand, ["--help", "all"])
    text = capsys.readouterr().out
    for section, model in Config.model_fields.items():
        if hasattr(model.annotation, "model_fields"):
            for name, field in model.annotation.model_fields.items():
                assert f"--{section}.{name}" in text
                assert field.description, f"{section}.{name} has no description"


def test_help_shows_what_a_plain_run_has(tmp_path, capsys):
    def default_of(field: str, *argv: str) -> str:
        with pytest.raises(SystemExit):
            load(SweepCommand, ["--help", "all", *argv])
        words = " ".join(capsys.readouterr().out.partition("show this help message")[2].split())
        return words.partition(f"--{field} ")[2].partition("(default: ")[2].partition(")")[0]

    plain = load(SweepCommand, [])
    assert default_of("train.lr") == str(plain.train.lr) != str(Config().train.lr)
    assert default_of("cluster.lockstep") == str(plain.cluster.lockstep) and default_of("output") == str(plain.home)
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 0.125}\nmodel: {name: owner/name}\n")
    assert (
        default_of("train.lr", "--config", str(path)) == "0.125"
        and default_of("model.name", "--config", str(path)) == "owner/name"
    )
    path.write_text("train: {learning_rate: 1}\n")
    with pytest.raises(ValueError, match="train.learning_rate: no such field"):
        load(SweepCommand, ["--help", "--config", str(path)])


def test_help_shows_what_matters_first_and_a_section_when_asked(capsys):
    def shown(*argv: str) -> str:
        with pytest.raises(SystemExit) as end:
            load(SweepCommand, list(argv))
        assert end.value.code == 0
        return capsys.readouterr().out

    short = shown("--help")
    plain = load(SweepCommand, [])
    for name in MATTER:
        section, _, inner = name.rpartition(".")
        assert inner in type(getattr(plain, section) if section else plain).model_fields and f"--{name} " in short
    assert len(MATTER) <= 16 and "--train.threads" not in short
    assert all(f"{name} ({len(model.model_fields)})" in short for name, model in sections().items())
    train = shown("-h", "train")
    assert (
        "--train.threads INT" in train and "--sae.width" not in train and "--sweep.data {" in shown("--help", "sweep")
    )
    assert "--harvest.store URL" in shown("--help", "harvest") and "--status" in train
    assert shown("--help", "--verbose") == short
    with pytest.raises(ValueError, match="--help trian: no such section; there are corpus, model, .*track and all"):
        load(SweepCommand, ["--help", "trian"])


def test_a_chain_s_key_depends_on_what_decides_its_numbers_and_on_nothing_else():
    base = load(SweepCommand, [])

    def key(*argv):
        return fields_key(chain_fields(load(SweepCommand, list(argv)), 0, 16, "data"))

    same = key()
    assert same == fields_key(chain_fields(base, 0, 16, "data"))
    for argv in (
        ["--sweep.seeds", "0,1,2"],
        ["--sweep.k", "8,16"],
        ["--train.log_steps", "7"],
        ["--sweep.cycles", "6"],
        ["--output", "/elsewhere"],
        ["--name", "other"],
        ["--cluster.concurrent", "1"],
        ["--compare.draws", "150"],
        ["--cluster.workers", "2"],
        ["--cluster.object_store_mb", "64"],
        ["--train.screen", "fp32"],
        ["--train.checkpoint_steps", "7"],
        ["--train.parallel", "latent"],
        ["--train.micro_batch", "64"],
        ["--sae.decoder", "learned"],
        ["--sae.prefixes", "fixed"],
        ["--train.l2", "0"],
    ):
        assert key(*argv) == same, argv
    for argv in (
        ["--train.lr", "0.001"],
        ["--sae.width", "4096"],
        ["--attribution.tau", "0.8"],
        ["--train.threads", "2"],
        ["--sweep.data_seed", "5"],
        ["--sweep.data", "disjoint"],
        ["--selection.size", "0.5"],
        ["--sae.core_transfer", "init"],
        ["--sae.core_transfer", "random"],
        ["--sae.decoder", "frozen_random", "--sae.core_decoder_init", "kept"],
        ["--train.l2", "1e-6"],
        ["--sae.prefixes", "sampled"],
        ["--selection.by", "norm", "--selection.size", "match"],
        ["--attribution.aggregator", "quantile"],
        ["--attribution.until_jaccard", "0.9"],
        ["--attribution.candidates", "all"],
        ["--attribution.outlier_norm", "5"],
    ):
        assert key(*argv) != same, argv


def test_keys_of_chains_that_finished_before_a_field_came_are_theirs_for_good():
    """Of the shipped quickstart, as it has been since chains are named so (format 4)."""
    config = load(SweepCommand, ["--config", str(CONFIGS / "quickstart.yaml")])
    assert [fields_key(chain_fields(config, 0, 16, "d")), fields_key(chain_fields(config, 1, 40, "d"))] == [
        "805a15db62ea",
        "8c51d8c626f9",
    ]


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["--sae.decoder", "frozen_random"], "set sae.core_decoder_init to kept"),
        (["--sae.core_decoder_init", "kept", "--sae.core_transfer", "random"], "use encoder or random"),
        (["--train.l2", "-1"], "greater than or equal to 0"),
    ],
)
def test_controls_in_training_that_contradict_themselves_are_named(argv, remedy):
    with pytest.raises(ValueError, match=remedy):
        load(SweepCommand, argv)


def test_output_folder_is_absolute_and_lasting(monkeypatch, tmp_path):
    monkeypatch.delenv("DMSAE_RAY_HOME", raising=False)
    assert load(SweepCommand, []).home == Path.home() / "dmsae_ray" / "quickstart"
    monkeypatch.setenv("DMSAE_RAY_HOME", str(tmp_path))
    assert load(SweepCommand, []).home == tmp_path / "quickstart"
    assert load(HarvestCommand, ["--output", "x"]).home == Path.cwd() / "x"


def test_resolved_configuration_reads_back_as_itself(tmp_path):
    import yaml

    config = load(
        SweepCommand,
        ["--train.lr", "0.002", "--sweep.seeds", "7,8", "--corpus.mixture", '[{"source": "a", "weight": 2}]'],
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.section_dict()))
    assert load(SweepCommand, ["--config", str(path)]).section_dict() == config.section_dict()


def test_the_package_carries_the_quickstart():
    packaged = Path(__file__).parents[2] / "dmsae_ray" / "configs" / "quickstart.yaml"
    assert packaged.read_text() == (CONFIGS / "quickstart.yaml").read_text()

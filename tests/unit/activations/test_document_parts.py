"""Where documents are dealt to parts, no text is in two: told from the rows themselves.

Every document is one word of its own, over and over, and the hook is where the stream is still the token's embedding:
a row says which document it comes from.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from dmsae_ray.activations.catalogue import find_datasets
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.harvester import Harvest
from dmsae_ray.activations.shard import ShardEntry, read_rows
from dmsae_ray.activations.shard_maker import ShardMaker
from dmsae_ray.config import Config
from dmsae_ray.distill.grid import plan_chains
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.lm.source import load_tokenizer

T, HOOK = 32, "blocks.0.hook_resid_pre"
TWICE = 200
"""Documents that stand in the corpus twice, word for word."""


@cache
def words() -> dict[int, str]:
    """Tokens that are a word, which stays that token when it is said again and again."""
    tokenizer = load_tokenizer("tiny")
    found = {}
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token])
        plain = word.startswith(" ") and word.strip().isalpha() and len(word) > 4
        if plain and tokenizer(word * 3, add_special_tokens=False)["input_ids"] == [token] * 3:
            found[token] = word
    return dict(list(found.items())[:500])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of documents of up to six sequences and of a fraction of one; lengths by token."""
    rng = np.random.default_rng(5)
    lengths = {token: int(rng.integers(17, 6 * T)) for token in words()}
    texts = [word * lengths[token] for token, word in words().items()]
    texts += texts[:TWICE]
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in rng.permutation(len(texts))))
    return path, lengths


def configured(corpus, folder, *argv) -> Config:
    given = {
        "output": folder,
        "corpus.source": corpus[0],
        "corpus.attribution_share": 0.15,
        "corpus.evaluation_share": 0.1,
        "model.hook": HOOK,
        "model.context": T,
        "harvest.tokens": 12_288,
        "harvest.calibration_tokens": 512,
        "harvest.rows_per_group": 256,
        "harvest.rows_per_shard": 2048,
        "train.batch": 256,
        "attribution.tokens": 500,
        "evaluate.tokens": 500,
        "features.tokens": 500,
        "sweep.k": 4,
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return Config(**load(SweepCommand, [*flags, *argv]).section_dict())


def harvested(config: Config, backward: bool = False) -> tuple[ActivationDataset, ShardMaker]:
    """Without Ray: the harvest's own maker in this process; backward: the last shard first."""
    work = Harvest(config, lambda line: None)
    maker = ShardMaker(config, work.targets, str(work.tokens), work.plans[0])
    plans = work.plans[::-1] if backward else work.plans
    rows = maker({"plans": [json.dumps([plan.to_dict() for plan in plans])]})
    for plan, row in zip(plans, rows, strict=True):
        for hook, entry in json.loads(row["entries"][0]).items():
            work.entries[hook][plan.name] = ShardEntry(**entry)
    return work._finish(work.targets[0]), maker


class Provenance:
    """Which document a row comes from."""

    def __init__(self, dataset: ActivationDataset, maker: ShardMaker):
        self.dataset, tokens = dataset, torch.tensor([*words()])[None]
        rows_ND = maker.lm.sites(tokens, [HOOK])[HOOK][0].half()
        self.token = {row_D.numpy().tobytes(): token for row_D, token in zip(rows_ND, words(), strict=True)}
        assert len(self.token) == len(words())

    def of_rows(self, rows_ND: torch.Tensor) -> Counter:
        return Counter(self.token[row_D.numpy().tobytes()] for row_D in rows_ND)

    def of_shards(self, files: set[str]) -> Counter:
        m, found = self.dataset.manifest, Counter[int]()
        for entry in [entry for entry in m.shards if entry.file in files]:
            found += self.of_rows(read_rows(self.dataset.store, entry, m.rows_per_group, m.d, m.dtype))
        return found

    def of_chains(self, config: Config) -> list[Counter]:
        """Rows that each chain is trained on, by document."""
        return [
            self.of_shards({unit.file for unit in plan.units(self.dataset)})
            for plan in plan_chains(config, self.dataset)
        ]

    def of_text(self, split: str) -> Counter:
        return Counter(int(i) for i in self.dataset.held_out(split).ids.flatten() if int(i) in words())


def shared(one: Counter, other: Counter) -> float:
    """Share of one's rows whose documents are also the other's."""
    return sum(rows for document, rows in one.items() if document in other) / one.total()


@pytest.mark.parametrize("packing", ["separate", "concatenate"])
@pytest.mark.parametrize("seeds", ["0,1", "0,1,2"])
def test_no_document_gives_rows_to_two_parts_nor_to_what_is_held_back_or_held_out(tmp_path, corpus, packing, seeds):
    config = configured(
        corpus, tmp_path, "--sweep.data", "disjoint", "--sweep.seeds", seeds, "--corpus.packing", packing
    )
    dataset, maker = harvested(config)
    told, (_, lengths) = Provenance(dataset, maker), corpus
    parts = told.of_chains(config)
    calibration = told.of_rows(dataset.calibration_rows())
    assert calibration.total() == 512 and {part.total() for part in parts} == {12_288 // len(parts) // 256 * 256}
    texts = [*parts, calibration, told.of_text("evaluation"), told.of_text("attribution")]
    assert all(len(text) > 1 for text in texts)
    for number, one in enumerate(texts):
        for other in texts[number + 1 :]:
            assert not set(one) & set(other)
    # The core is chosen on text that is a part's own, too.
    plans = plan_chains(config, dataset)
    assert [plan.attribution_split for plan in plans] == [f"attribution-{part}" for part in range(len(parts))]
    own = [told.of_text(plan.attribution_split) for plan in plans]
    assert all(text.total() >= 500 for text in own) and len(set().union(*own)) == sum(map(len, own))
    # What could have gone wrong was there: documents of several sequences, and the same text twice in one part.
    for part in parts:
        assert any(rows > 2 * T for rows in part.values())
        assert any(rows > lengths[document] for document, rows in part.items())
    if packing == "concatenate":  # nor does a row see text of another part before it
        sequences = [maker._sequences[split].ids for split in ("train-0", "train-1")]
        assert any(len(set(ids_T[1:]) & set(words())) > 1 for ids_T in sequences[0])
        first, second = ({int(i) for i in ids.flatten()} & set(words()) for ids in sequences)
        assert first and second and not first & second


def test_without_parts_halves_of_the_shards_come_from_the_same_documents(tmp_path, corpus):
    """What dealing by document is for: sequences were dealt, and nearly every document was in both halves."""
    config = configured(corpus, tmp_path)
    dataset, maker = harvested(config)
    told, files = Provenance(dataset, maker), [entry.file for entry in dataset.manifest.shards]
    assert len(files) == 6 and shared(told.of_shards({*files[:3]}), told.of_shards({*files[3:]})) > 0.7
    assert shared(told.of_rows(dataset.calibration_rows()), told.of_shards({*files})) > 0.7


def test_chains_on_shared_data_read_all_parts(tmp_path, corpus):
    config = configured(corpus, tmp_path, "--sweep.parts", "2")
    dataset, maker = harvested(config)
    told = Provenance(dataset, maker)
    one, other = told.of_chains(config)
    assert one == other and one.total() == dataset.manifest.rows == 12_288
    apart = told.of_chains(configured(corpus, tmp_path, "--sweep.data", "disjoint"))
    assert apart[0] + apart[1] == one, "one harvest serves both"


def test_shards_of_parts_are_the_same_whoever_makes_which_first(tmp_path, corpus):
    files = []
    for name, backward in (("forward", False), ("backward", True)):
        config = configured(corpus, tmp_path / name, "--sweep.data", "disjoint")
        dataset, _ = harvested(config, backward)
        files.append({entry.file: dataset.store.read(entry.file) for entry in dataset.entries()})
        assert find_datasets(config, config.hooks)[HOOK].manifest == dataset.manifest
    assert files[0] == files[1] and len(files[0]) == 7


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--harvest.tokens", "65_536"],
            r"harvest\.tokens 65536 .*dealt to sweep\.parts 2: the corpus's (calibration|train-0) text gives only",
        ),
        (
            ["--attribution.tokens", "5000"],
            r"attribution\.tokens 5000: the corpus's attribution split of part \d of sweep\.parts 2 has only \d+; ask "
            r"for fewer or raise corpus\.attribution_share",
        ),
    ],
)
def test_a_part_without_enough_text_is_named_before_anything_is_computed(tmp_path, corpus, argv, said):
    with pytest.raises(ValueError, match=said):
        Harvest(configured(corpus, tmp_path, "--sweep.data", "disjoint", *argv), lambda line: None)
    assert not list(tmp_path.glob("data/*/shards/*"))

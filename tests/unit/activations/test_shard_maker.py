"""Shards out of the real small model, without Ray: the rows are transformers' own, and the bytes depend on the plan
alone.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from language_models import TINY, reference
from safetensors.torch import load_file, save_file
from shards import bits, some_rows

from dmsae_ray.activations.shard import DTYPES, ShardEntry, ShardWriter, inspect_shard
from dmsae_ray.activations.shard_maker import ShardMaker, Target, drop, median_norm
from dmsae_ray.activations.shard_plan import ShardPlan, plan_shards
from dmsae_ray.config import Config, HarvestConfig
from dmsae_ray.corpus.split import UNDEALT
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.store import Store

T, BOS, PAD, PER_FORWARD, PER_GROUP = 24, 2, 0, 4, 128
PRE, POST = "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"
STATE = {PRE: 0, POST: 3}
"""Which of transformers' hidden states stands at the hook."""


def sequences_of(count=90, seed=0):
    """BOS first, padding right, and in every third sequence a second document."""
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(5, T + 1, count).astype(np.int32)
    ids_NT = rng.integers(3, 4096, (count, T)).astype(np.int32)
    ids_NT[:, 0], ids_NT[::3, 3] = BOS, BOS
    ids_NT[np.arange(T) >= lengths_N[:, None]] = PAD
    return TokenSequences(
        ids_NT, lengths_N, ((np.arange(T) < lengths_N[:, None]) & (ids_NT != BOS)).sum(axis=1).astype(np.int32)
    )


def configured(model="tiny", **harvest):
    harvest = {
        "tokens": 1024,
        "outlier_norm": None,
        "rows_per_group": PER_GROUP,
        "rows_per_shard": 2 * PER_GROUP,
        "sequences_per_forward": PER_FORWARD,
    } | harvest
    return Config(model={"name": str(model), "hook": POST, "context": T}, harvest=harvest)


def target_of(folder, hook, key="key"):
    return Target(hook, Store(folder / hook), {"dataset": f"{key}-{hook}", "hook": hook})


def make(maker, targets, plans) -> dict[str, dict[str, ShardEntry]]:
    """What an actor for these targets gives for these plans: plan -> hook -> entry. The model is loaded once for all
    tests.
    """
    maker.targets, maker._writers = targets, {target.hook: ShardWriter() for target in targets}
    rows = list(maker({"plans": [json.dumps([plan.to_dict() for plan in plans])]}))
    return {
        row["plan"][0]: {hook: ShardEntry(**entry) for hook, entry in json.loads(row["entries"][0]).items()}
        for row in rows
    }


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    sequences, folder = sequences_of(), tmp_path_factory.mktemp("tokens")
    sequences.save(folder / "train.safetensors")
    return sequences, folder


def planned(tokens, groups, reserve=0.0):
    """The shards of so many row groups of these sequences."""
    harvest = HarvestConfig.model_construct(
        tokens=groups * PER_GROUP,
        calibration_tokens=100,
        rows_per_shard=2 * PER_GROUP,
        rows_per_group=PER_GROUP,
        seed=0,
    )
    return plan_shards({"train": tokens[0].rows}, harvest, UNDEALT, reserve)


@pytest.fixture(scope="module")
def maker(tokens, tmp_path_factory):
    calibration = planned(tokens, 5)[0]
    return ShardMaker(configured(), [target_of(tmp_path_factory.mktemp("first"), POST)], str(tokens[1]), calibration)


@pytest.fixture(scope="module")
def plans(tokens):
    """A calibration shard, two full ones and one of a single row group."""
    return planned(tokens, 5)


def files_of(target):
    return {
        name: (target.store.read(name), (target.store.local / name).stat().st_mtime_ns)
        for name in target.store.sizes("shards")
    }


@torch.no_grad()
def rows_of_transformers(sequences, plan, hook, alone=False):
    """Every row of the plan's sequences, fp32, in their order. alone: each sequence by itself, without padding."""
    states = []
    if alone:
        for n in plan.sequences:
            ids = torch.from_numpy(sequences.ids[n, : sequences.lengths[n]].astype(np.int64))[None]
            states += [reference("tiny")(ids, output_hidden_states=True).hidden_states[STATE[hook]][0]]
    else:
        for first in range(0, len(plan.sequences), PER_FORWARD):
            picked = [*plan.sequences[first : first + PER_FORWARD]]
            picked += [picked[0]] * (PER_FORWARD - len(picked))  # one shape for all passes: it decides the last bits
            ids = torch.from_numpy(sequences.ids[picked].astype(np.int64))
            states += reference("tiny")(ids, output_hidden_states=True).hidden_states[STATE[hook]]
    return torch.stack(
        [
            state_TD[t]
            for n, state_TD in zip(plan.sequences, states, strict=False)
            for t in range(sequences.lengths[n])
            if sequences.ids[n, t] != BOS
        ]
    )


def rows_in(target, plan, dtype="float16"):
    """What any Parquet reader finds in the file."""
    raw = b"".join(pq.read_table(target.store.local / plan.file).column(0).to_pylist())
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).view(plan.rows, -1)


def test_rows_are_transformers_hidden_states_in_the_planned_order(maker, tokens, plans, tmp_path):
    targets = [target_of(tmp_path, POST), target_of(tmp_path, PRE)]
    made = make(maker, targets, plans)
    assert list(made) == [plan.name for plan in plans] == ["calibration", "train-00000", "train-00001", "train-00002"]
    sequences = tokens[0]
    for plan in plans:
        order = torch.from_numpy(plan.permutation(0))
        for target in targets:
            found_ND = rows_in(target, plan)
            expected_ND = rows_of_transformers(sequences, plan, target.hook)[: plan.rows][order]
            assert torch.equal(bits(found_ND), bits(expected_ND.half())), (plan.name, target.hook)
            alone_ND = rows_of_transformers(sequences, plan, target.hook, alone=True)[: plan.rows][order]
            torch.testing.assert_close(found_ND.float(), alone_ND, rtol=2**-10, atol=2**-10)
            entry = made[plan.name][target.hook]
            assert (entry, target.about["dataset"]) == (inspect_shard(target.store, plan.file)[0], f"key-{target.hook}")
            # Every position of every sequence is a row, or is said to be none.
            ids, lengths = sequences.ids[list(plan.sequences)], sequences.lengths[list(plan.sequences)]
            real = np.arange(T) < lengths[:, None]
            assert entry.positions == {
                "bos": int(((ids == BOS) & real).sum()),
                "padding": int((~real).sum()),
                "outlier": 0,
                "unused": int(sequences.rows[list(plan.sequences)].sum()) - plan.rows,
            }


def test_a_hook_s_dataset_is_the_same_bytes_alone_and_beside_another(maker, plans, tmp_path):
    both = [target_of(tmp_path / "both", hook) for hook in (POST, PRE)]
    make(maker, both, plans)
    for together in both:
        alone = target_of(tmp_path / "alone", together.hook)
        make(maker, [alone], plans[::-1])  # in another order too: another actor's
        assert len(files_of(alone)) == len(plans)
        assert {name: raw for name, (raw, _) in files_of(alone).items()} == {
            name: raw for name, (raw, _) in files_of(together).items()
        }


def test_what_is_finished_is_not_made_again(maker, plans, tmp_path):
    targets = [target_of(tmp_path, POST), target_of(tmp_path, PRE)]
    first = make(maker, targets, plans)
    before = [files_of(target) for target in targets]
    assert make(maker, targets, plans) == first and [files_of(target) for target in targets] == before
    # What is missing or bad of one hook is made again, and that alone.
    store = targets[1].store
    store.delete(plans[1].file)
    store.write(plans[2].file, before[1][plans[2].file][0][:-1])
    assert make(maker, targets, plans) == first
    after = [files_of(target) for target in targets]
    assert after[0] == before[0]
    assert {name for name in after[1] if after[1][name][1] != before[1][name][1]} == {plans[1].file, plans[2].file}
    assert all(after[1][name][0] == before[1][name][0] for name in after[1])


def test_a_shard_of_another_dataset_or_size_is_not_taken_for_the_plan_s(maker, plans, tmp_path):
    make(maker, [target_of(tmp_path, POST)], plans[:2])
    assert target_of(tmp_path, POST).finished(plans[1]) is not None
    assert target_of(tmp_path, POST, key="other").finished(plans[1]) is None
    shorter = ShardPlan(plans[1].name, plans[1].number, plans[1].sequences, plans[1].rows - PER_GROUP)
    assert target_of(tmp_path, POST).finished(shorter) is None


@contextmanager
def bounded(maker, plans, factor, **harvest):
    """The maker of these plans with a bound on norms, and nothing known of it."""
    before = maker.config, maker._bounds, maker.calibration
    maker.config, maker._bounds, maker.calibration = configured(outlier_norm=factor, **harvest), {}, plans[0]
    try:
        yield
    finally:
        maker.config, maker._bounds, maker.calibration = before


def spared(tokens, reserve):
    return planned(tokens, 3, reserve)


def test_one_bound_holds_in_every_shard_whoever_makes_which_first(maker, tokens, tmp_path):
    """It is a multiple of the calibration sequences' median, known to an actor that is given another shard first,
    too.
    """
    plans = spared(tokens, 0.5)
    norms = rows_of_transformers(tokens[0], plans[0], POST).half().float().norm(dim=1)
    factor = float(norms.sort().values[-len(norms) // 10] / norms.median())  # a tenth of them exceeds it
    bound, targets = (
        factor * float(norms.median()),
        [target_of(tmp_path / name, POST) for name in ("forward", "backward")],
    )
    for target, order in zip(targets, (plans, plans[::-1]), strict=True):
        with bounded(maker, plans, factor, outlier_reserve=0.5):
            made = make(maker, [target], order)
        for plan in plans:
            found = rows_in(target, plan).float().norm(dim=1)
            assert len(found) == plan.rows and float(found.max()) <= bound
            assert inspect_shard(target.store, plan.file)[1]["max_norm"] == pytest.approx(bound)
            entry = made[plan.name][POST]
            assert entry.positions["outlier"] > 0
            # Every position of the sequences that were computed, whole forward passes of spare ones, is a row or is
            # said to be none.
            computed = (sum(entry.positions.values()) + plan.rows) // T - len(plan.sequences)
            assert sum(entry.positions.values()) + plan.rows == T * (len(plan.sequences) + computed)
            assert computed in {min(PER_FORWARD * i, len(plan.spare)) for i in range(9)}
    assert {name: raw for name, (raw, _) in files_of(targets[0]).items()} == {
        name: raw for name, (raw, _) in files_of(targets[1]).items()
    }


def test_without_outliers_the_bound_changes_no_row(maker, tokens, tmp_path):
    free, (plans, with_spare) = target_of(tmp_path / "free", POST), (spared(tokens, 0.0), spared(tokens, 0.3))
    make(maker, [free], plans)
    target = target_of(tmp_path / "bounded", POST)
    with bounded(maker, with_spare, 1000.0):
        made = make(maker, [target], with_spare)
    for plan, spare in zip(plans, with_spare, strict=True):
        assert torch.equal(bits(rows_in(free, plan)), bits(rows_in(target, spare))) and spare.spare and not plan.spare
        assert made[plan.name][POST].positions["outlier"] == 0


def test_a_reserve_that_does_not_last_is_named(maker, tokens, tmp_path):
    plans = spared(tokens, 0.05)
    with bounded(maker, plans, 1.01), pytest.raises(ValueError) as error:
        make(maker, [target_of(tmp_path, POST)], plans)
    for words in (
        "shard calibration",
        "harvest.outlier_norm 1.01 drops",
        "harvest.outlier_reserve (now 0.05)",
        "corpus.source more text",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 5000])
def test_kept_rows_are_those_up_to_the_bound(rows, dtype):
    rows_RD = some_rows(rows, dtype=dtype) * torch.rand(rows, 1, generator=torch.Generator().manual_seed(1)).to(
        DTYPES[dtype]
    )
    norms = np.linalg.norm(rows_RD.double().numpy(), axis=1)
    median = np.sort(norms)[(rows - 1) // 2]
    assert median_norm(rows_RD) == pytest.approx(median, rel=1e-6)
    kept_RD, dropped = drop(rows_RD, 1.2 * median)
    good = norms <= 1.2 * median
    assert torch.equal(kept_RD, rows_RD[torch.from_numpy(good)]) and dropped == int((~good).sum()) > 0


def test_a_norm_of_exactly_the_bound_stays():
    rows_RD = torch.tensor([[3.0, 4.0], [10.0, 0.0], [5.0, 0.0], [10.1, 0.0], [0.0, 5.0]]).half()
    kept_RD, dropped = drop(rows_RD, 10.0)
    assert kept_RD.tolist() == rows_RD[[0, 1, 2, 4]].tolist() and dropped == 1
    assert drop(rows_RD, None)[0] is rows_RD


# -- values that do not fit
# ----------------------------------------------------------------------------------------------

TOKEN = 1000


def model_with(folder, value):
    """The small model, in which one token's embedding is this large in one dimension."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][TOKEN] = 0
    weights["model.embed_tokens.weight"][TOKEN, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def one_sequence(tmp_path):
    ids = np.arange(100, 100 + T, dtype=np.int32)[None].copy()
    ids[0, 0], ids[0, 9] = BOS, TOKEN
    length = np.array([T], dtype=np.int32)
    TokenSequences(ids, length, length - np.int32(1)).save(tmp_path / "train.safetensors")
    return ids[0], ShardPlan("train-00000", 1, (0,), T - 1)


@pytest.mark.parametrize(
    "value, why",
    [
        (1e4, "its largest value 1.1"),
        (3e38, "the model gives NaN or infinity there"),
    ],
    ids=["fp16", "inf"],
)
def test_a_value_that_does_not_fit_names_the_token_and_nothing_is_written(tmp_path, one_sequence, value, why):
    ids, plan = one_sequence
    target = target_of(tmp_path, PRE)
    maker = ShardMaker(configured(model_with(tmp_path / "model", value)), [target], str(tmp_path), plan)
    with pytest.raises(ValueError) as error:
        make(maker, [target], [plan])
    message, piece = str(error.value), maker.lm.tokenizer.decode(ids[1:10])
    assert repr(piece) in message and f"shard train-00000, {PRE}, harvest.dtype float16" in message and why in message
    assert ("use harvest.dtype bfloat16" in message) == (value == 1e4)
    assert target.store.sizes("shards") == {}


def test_a_value_that_does_not_fit_is_an_outlier_where_those_are_left_out(tmp_path, one_sequence):
    ids, plan = one_sequence
    plan = replace(plan, rows=T - 2)
    target, config = target_of(tmp_path, PRE), configured(model_with(tmp_path / "model", 1e4), outlier_norm=10.0)
    maker = ShardMaker(config, [target], str(tmp_path), plan)
    (entry,) = (of[PRE] for of in make(maker, [target], [plan]).values())
    assert entry.positions["outlier"] == 1 and entry.positions["unused"] == 0
    assert torch.isfinite(rows_in(target, plan, "float16")).all()


def test_bfloat16_holds_what_float16_cannot(tmp_path, one_sequence):
    _, plan = one_sequence
    target = target_of(tmp_path, PRE)
    maker = ShardMaker(
        configured(model_with(tmp_path / "model", 1e4), dtype="bfloat16"),
        [target],
        str(tmp_path),
        plan,
    )
    make(maker, [target], [plan])
    found_ND = rows_in(target, plan, "bfloat16")
    largest = float(found_ND.float().abs().max())
    assert 65504 < largest == pytest.approx(1e4 * 128**0.5, rel=1e-2)
    assert torch.isfinite(found_ND).all()

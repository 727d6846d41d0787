"""features.json from text to file, on the real small model: what is in it, in which order, and what was refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from features_cases import BOS, random_sae
from language_models import load
from test_core import make_core

from dmsae_ray.config import FeaturesConfig
from dmsae_ray.corpus.documents import Document
from dmsae_ray.corpus.encode import encode
from dmsae_ray.corpus.packing import Concatenate
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.driver.options import SweepCommand
from dmsae_ray.driver.options import load as load_config
from dmsae_ray.lm.divergence import token_losses
from dmsae_ray.results.features.features import NEAR, ChainCore, features_key, write_features
from dmsae_ray.results.features.roster import roster_of

SCALE = 20.0
TEXTS = [
    *(
        f"def step_{i}(self, value):\n    return value + {i}\n\n\nclass Reader{i}:\n    def read(self, path):\n      "
        "  pass\n"
        for i in range(12)
    ),
    *(
        f"The list is sorted in place, and item {i} comes first. It’s done: see :func:`sorted`.\n" * 3
        for i in range(12)
    ),
]
SILENT = 4


@pytest.fixture(scope="module")
def lm():
    return load("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def sequences(lm):
    """Documents joined and cut at 48, so that most sequences hold parts of several."""
    packing = Concatenate(48, lm.bos_id, lm.pad_id)
    parts = [packing.add(document.ids) for document in encode((Document("text", text) for text in TEXTS), lm.tokenizer)]
    parts.append(packing.rest())
    return TokenSequences(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "lengths", "rows"))
    )


@pytest.fixture(scope="module")
def chains(lm, sequences, tmp_path_factory):
    """Three chains of two seeds; latent 4 of the last one is silent, the others fire here and there."""
    folder, made = tmp_path_factory.mktemp("saes"), []
    ids_NT, lengths_N = (torch.from_numpy(array.astype(np.int64)) for array in (sequences.ids, sequences.lengths))
    mean_D = lm.cut(ids_NT).value_BTD[lm.rows(ids_NT, lengths_N)].mean(dim=0) / SCALE
    for number, (seed, ids) in enumerate([(0, [1, 4, 6]), (0, [0, 3]), (7, [2, SILENT])]):
        sae = random_sae(lm.d, 8, 0.05, seed=number)
        with torch.no_grad():
            sae.b_dec.copy_(mean_D)
            if number == 2:
                sae.b_enc[SILENT] = -1e6
        path = folder / f"{number}.safetensors"
        sae.save(path, {})
        core = make_core(
            size=len(ids),
            d=lm.d,
            W_enc_CD=sae.encoder_rows()[ids],
            W_dec_CD=sae.W_dec[ids],
            b_enc_C=sae.b_enc[ids],
            b_dec_D=sae.b_dec,
            latent_ids_C=torch.tensor(ids),
            scores_C=torch.tensor([4.0, 1.0, 3.0][: len(ids)]) * (number + 1),
            density_C=torch.tensor([0.5, 0.25, 0.125][: len(ids)]),
            seed=seed,
            scale=SCALE,
        )
        made.append(ChainCore(f"chain{number}", core, path))
    return made


def group(name: str, members: list[tuple[str, int, int]], score: float) -> dict:
    return {
        "id": name,
        "members": [{"chain": c, "index": i, "latent": n, "score": -1.0, "density": -1.0} for c, i, n in members],
        "in_chains": len(members),
        "in_seeds": 1 + (len(members) > 2),
        "elsewhere": float(len(members) > 2),
        "interval": [0.25, 1.0],
        "cosine": 0.9 if len(members) > 1 else None,
        "smallest_cosine": 0.8 if len(members) > 1 else None,
        "score": score,
        "density": 0.3,
        "in_core": len(members) > 2,
    }


CONSENSUS = {
    "format_version": 1,
    "chains": ["chain0", "chain1", "chain2"],
    "seeds": [0, 7],
    "groups": [
        group("f000", [("chain0", 2, 6), ("chain1", 0, 0), ("chain2", 0, 2)], 0.6),
        group("f001", [("chain0", 1, 4), ("chain1", 1, 3)], 0.2),
        group("f002", [("chain0", 0, 1)], 0.5),
    ],
}


def make(tmp_path, lm, sequences, chains, consensus=CONSENSUS, **settings):
    path = tmp_path / "features.json"
    content = write_features(
        path, lm, sequences, SCALE, lm.tokenizer, chains, consensus, FeaturesConfig(**settings), key="k"
    )
    assert json.loads(path.read_text()) == content
    return content


def test_what_chains_share_comes_first_and_every_core_latent_once(tmp_path, lm, sequences, chains):
    content = make(tmp_path, lm, sequences, chains)
    assert (content["format_version"], content["key"], content["left_out"]) == (2, "k", 0)
    counted = sum((sequences.ids[s, :n] != BOS).sum() for s, n in enumerate(sequences.lengths))
    assert content["tokens"] == sequences.tokens == counted
    features = content["features"]
    # chain2's silent latent is in no group: it carries 1 of its core's 5; f002 is in a group alone.
    kinds = [(f["id"], f["kind"]) for f in features]
    assert kinds == [("f000", "consensus"), ("f001", "consensus"), ("f002", "core"), ("chain2.4", "core")]
    shared, pair, alone, silent = features
    # Scores are 4, 1, 3 times 1, 2, 3 for the chains: chain2's first row has 12.
    assert shared["representative"] == {"chain": "chain2", "index": 0, "latent": 2, "score": 12.0, "density": 0.5}
    assert [(p["chain"], p["index"], p["latent"], p["score"], p["density"]) for p in shared["partners"]] == [
        ("chain1", 0, 0, 8.0, 0.5),
        ("chain0", 2, 6, 3.0, 0.125),
    ]
    rows = {chain.label: chain.core.W_dec_CD for chain in chains}
    for partner in shared["partners"]:
        cosine = float(rows["chain2"][0] @ rows[partner["chain"]][partner["index"]])
        assert partner["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert (shared["chains"], shared["in_chains"]) == (["chain2", "chain1", "chain0"], 3)
    assert [
        shared[n]
        for n in (
            "in_seeds",
            "n_chains",
            "n_seeds",
            "elsewhere",
            "interval",
            "score",
            "density",
            "cosine",
            "smallest_cosine",
        )
    ] == [2, 3, 2, 1.0, [0.25, 1.0], 0.6, 0.3, 0.9, 0.8]
    assert pair["representative"]["chain"] == "chain1" and alone["partners"] == [] and alone["cosine"] is None
    assert silent["score"] == pytest.approx(0.2) and silent["elsewhere"] is silent["interval"] is None
    assert (silent["max_activation"], silent["mean_loss_change"], silent["contexts"], silent["effects"]) == (
        0.0,
        None,
        [],
        [],
    )


def test_without_a_comparison_every_latent_stands_alone(tmp_path, lm, sequences, chains):
    content = make(tmp_path, lm, sequences, chains, consensus=None, most=5)
    # Shares of 8, 10 and 15; equal ones in the order of chains.
    assert [f["id"] for f in content["features"]] == ["chain1.0", "chain2.2", "chain0.1", "chain0.6", "chain1.3"]
    assert [f["score"] for f in content["features"]] == pytest.approx([0.8, 0.8, 0.5, 0.375, 0.2])
    assert content["left_out"] == 2 and {f["kind"] for f in content["features"]} == {"core"}
    assert all(
        (f["n_chains"], f["n_seeds"], f["in_seeds"], f["elsewhere"]) == (3, 2, 1, None) for f in content["features"]
    )


def test_contexts_and_effects_are_those_of_the_representative(tmp_path, lm, sequences, chains):
    """Read from the file, each word and number is found again with a whole pass over that one sequence."""
    window, settings = 3, {"window": 3, "contexts": 5, "spread": 2, "effects": 6, "sequences_per_batch": 4}
    content = make(
        tmp_path, lm, sequences, chains[::-1], **settings
    )  # the silent latent is then not the last that is read
    crossing = 0
    for feature in content["features"][:3]:
        chain, latent = (feature["representative"][name] for name in ("chain", "latent"))
        sae = type(random_sae(4, 4, 0)).load(next(c.sae for c in chains if c.label == chain))[0]
        z_NT, cut, ids_NT, lengths_N = activations(lm, sequences, sae, latent)
        assert [context["spread"] for context in feature["contexts"]] == [False] * 3 + [True] * 2
        peaks = [context["activations"][context["peak"]] for context in feature["contexts"]]
        assert (
            feature["max_activation"] == pytest.approx(peaks[0], rel=1e-5) == pytest.approx(float(z_NT.max()), rel=1e-5)
        )
        chosen, deltas = [], []
        for context, peak in zip(feature["contexts"], peaks, strict=True):
            (s,) = ((z_NT.amax(dim=1) - peak).abs() < 1e-5 * peak).nonzero()[:, 0].tolist()
            t = int(z_NT[s].argmax())
            document = ids_NT[s, : lengths_N[s]].tolist()
            start = max(i for i in range(t) if document[i] == BOS) + 1
            end = min([i for i in range(t, len(document)) if document[i] == BOS], default=len(document))
            first, last = max(start, t - window), min(end, t + window + 1)
            crossing += (first > t - window) + (last < t + window + 1)
            assert (context["peak"], context["document_token"]) == (t - first, t - start)
            assert "".join(context["tokens"]) == lm.tokenizer.decode(document[first:last]) or "<0x" in "".join(
                context["tokens"]
            )
            assert len(context["tokens"]) == len(context["activations"]) == last - first
            assert context["activations"] == pytest.approx(z_NT[s, first:last].tolist(), rel=1e-4, abs=1e-5)
            chosen.append(s)
            value_NTD = cut.value_BTD - z_NT[:, :, None] * SCALE * sae.W_dec[latent].detach()
            before, after = (token_losses(lm, cut, value, ids_NT, lengths_N)[s] for value in (cut.value_BTD, value_NTD))
            deltas.append(after - before)
        assert len(set(chosen)) == len(chosen)
        tokens = int(sequences.rows[chosen].sum())
        assert feature["mean_loss_change"] == pytest.approx(float(torch.stack(deltas).sum()) / tokens, abs=1e-5)
        largest = sorted(
            ((float(d), i, t) for i, delta in enumerate(deltas) for t, d in enumerate(delta)), key=lambda x: -abs(x[0])
        )[:6]
        assert [e["delta"] for e in feature["effects"]] == pytest.approx([d for d, _, _ in largest], abs=2e-5)
        for effect, (_, i, t) in zip(feature["effects"], largest, strict=True):
            document = ids_NT[chosen[i], : lengths_N[chosen[i]]].tolist()
            near = document[max(0, t - NEAR) : t]
            near = near[len(near) - near[::-1].index(BOS) :] if BOS in near else near
            after = document[t + 1 : t + 1 + NEAR]
            after = after[: after.index(BOS)] if BOS in after else after
            assert effect["before"] == lm.tokenizer.decode(near) and effect["after"] == lm.tokenizer.decode(after)
            assert effect["token"] == lm.tokenizer.decode([document[t]])
    assert crossing > 3, "no window reached the end of a document"
    assert "<bos>" not in json.dumps(content) and "<pad>" not in json.dumps(content)


@torch.no_grad()
def activations(lm, sequences, sae, latent):
    """The latent at every row of the corpus in one batch, 0 elsewhere."""
    ids_NT, lengths_N = (torch.from_numpy(array.astype(np.int64)) for array in (sequences.ids, sequences.lengths))
    cut = lm.cut(ids_NT)
    z_NT = sae.encode(cut.value_BTD / SCALE)[:, :, latent]
    return torch.where(lm.rows(ids_NT, lengths_N), z_NT, 0), cut, ids_NT, lengths_N


def test_the_same_twice_and_nearly_so_in_other_batches(tmp_path, lm, sequences, chains):
    first, again = (make(tmp_path, lm, sequences, chains, window=200) for _ in range(2))
    assert first == again
    other = make(tmp_path, lm, sequences, chains, window=200, sequences_per_batch=5)
    for one, two in zip(first["features"], other["features"], strict=True):
        assert [context["tokens"] for context in one["contexts"]] == [context["tokens"] for context in two["contexts"]]
        for a, b in zip(one["contexts"], two["contexts"], strict=True):
            assert a["activations"] == pytest.approx(b["activations"], rel=1e-4, abs=1e-5) and a["peak"] == b["peak"]


def test_a_window_may_be_longer_than_a_document_and_effects_may_be_left_out(tmp_path, lm, sequences, chains):
    content = make(tmp_path, lm, sequences, chains, window=1000, effects=0, spread=0, contexts=2, tokens=200)
    assert 200 <= content["tokens"] < 200 + 48
    for feature in content["features"][:3]:
        assert feature["effects"] == [] and feature["mean_loss_change"] is None and len(feature["contexts"]) == 2
        for context in feature["contexts"]:
            assert context["peak"] == context["document_token"] and len(context["tokens"]) <= 47


def test_consensus_of_other_cores_is_refused(lm, sequences, chains):
    cores = {chain.label: chain.core for chain in chains}
    for member in [("chain9", 0, 1), ("chain0", 3, 6), ("chain0", 1, 6)]:
        with pytest.raises(
            ValueError, match=f"consensus.json: f000 has latent {member[2]} of {member[0]} .* delete consensus.json"
        ):
            roster_of(cores, CONSENSUS | {"groups": [group("f000", [member], 0.5)]})


def test_no_chain_is_refused(tmp_path, lm, sequences):
    with pytest.raises(ValueError, match="no finished chain"):
        make(tmp_path, lm, sequences, [], consensus=None)


def test_cores_without_a_latent_have_no_features(tmp_path, lm, sequences, chains):
    empty = ChainCore("empty", make_core(size=0, d=lm.d), chains[0].sae)
    content = make(tmp_path, lm, sequences, [empty], consensus=None)
    assert content["features"] == [] and content["left_out"] == 0


def test_the_key_depends_on_all_that_decides_the_file():
    asked = {"settings": FeaturesConfig(), "dataset": "d", "cores": {"a": "1", "b": "2"}, "consensus": None}
    others = [
        {"settings": FeaturesConfig(window=3)},
        {"dataset": "e"},
        {"cores": {"a": "1", "b": "3"}},
        {"cores": {"b": "2", "a": "1"}},
        {"consensus": "c"},
    ]
    keys = [features_key(**asked | other) for other in [{}, *others]]
    assert len(set(keys)) == len(keys) and features_key(**asked) == keys[0]


def test_a_spread_without_a_top_is_refused():
    with pytest.raises(ValueError, match="features: features.spread 8 leaves none of features.contexts 6"):
        load_config(SweepCommand, ["--features.spread", "8"])
    assert load_config(SweepCommand, ["--features.spread", "0", "--features.most", "20"]).features == FeaturesConfig(
        tokens=24_576, contexts=6, spread=0, most=20
    )

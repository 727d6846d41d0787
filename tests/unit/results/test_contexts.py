"""Where latents fire, against a search through every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features_cases import BOS, TableModel, random_sae, sae_of, sequences_of
from language_models import load

from dmsae_ray.results.features.contexts import SAMPLE, find_peaks
from dmsae_ray.sae.latents import Latents

D, V = 4, 40


def small_integers(shape, seed: int) -> torch.Tensor:
    """Sums of their products are exact in fp32, and often equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape)).float()


@pytest.fixture(scope="module")
def case():
    """Sequences of one or two documents, and two chains' latents that tie everywhere; latent 5 of the first is
    silent.
    """
    rng = np.random.default_rng(0)
    rows = []
    for n in rng.integers(4, 30, 50):
        row = [BOS, *rng.integers(3, V, n).tolist()]
        if n > 12:
            row[7] = BOS
        rows.append(row)
    first = sae_of(small_integers((6, D), 1), torch.eye(6, D), theta=1.5)
    with torch.no_grad():
        first.b_enc[5] = -1000
    second = sae_of(small_integers((3, D), 2), torch.eye(3, D), theta=4.0, core_size=2, gate="relu")
    return TableModel(2 * small_integers((V, D), 3)), sequences_of(rows), [first, second]


@torch.no_grad()
def by_search(lm, sequences, saes, scale):
    """For each latent its (activation, sequence, position), one for a sequence, falling; ties in the order of the
    text.
    """
    found = []
    for sae in saes:
        for latent in range(sae.width):
            best = {}
            for s in range(len(sequences)):
                for t in range(int(sequences.lengths[s])):
                    token = int(sequences.ids[s, t])
                    z = float(sae.encode(lm.table_VD[token] / scale)[latent]) if token != BOS else 0.0
                    if z > best.get(s, (0.0,))[0]:
                        best[s] = (z, s, t)
            found.append(sorted(best.values(), key=lambda peak: (-peak[0], peak[1])))
    return found


@pytest.mark.parametrize("batch", [1, 7, 50, 64])
@pytest.mark.parametrize("contexts, spread", [(6, 0), (8, 2), (60, 3)])
def test_equals_a_search_through_every_token(case, batch, contexts, spread):
    lm, sequences, saes = case
    pieces = [Latents.some_of(sae, range(sae.width)) for sae in saes]
    peaks_L = find_peaks(pieces, lm, sequences, 2.0, contexts, spread, batch)
    truth_L = by_search(lm, sequences, saes, 2.0)
    assert (
        [len(truth) for truth in truth_L].count(0) == 1 and max(map(len, truth_L)) > 40 and len(truth_L) == len(peaks_L)
    )
    for peaks, truth in zip(peaks_L, truth_L, strict=True):
        strong, weak = (
            [(p.activation, p.sequence, p.position) for p in peaks if p.spread is weaker] for weaker in (False, True)
        )
        top = contexts - spread
        assert strong == truth[:top]
        # Fewer sequences than the sample holds: all of the rest are in it.
        rest = truth[top:]
        chosen = rest if len(rest) <= spread else [rest[int((i + 0.5) * len(rest) / spread)] for i in range(spread)]
        assert weak == chosen
        assert len({p.sequence for p in peaks}) == len(peaks) == min(contexts, len(truth))


def test_the_lower_blocks_run_once_for_all_chains(case):
    lm, sequences, saes = case
    before = lm.cuts
    find_peaks([Latents.some_of(sae, [0, 1]) for sae in saes for _ in range(3)], lm, sequences, 2.0, 4, 1, 10)
    assert lm.cuts - before == 5


def test_weaker_contexts_are_at_quantiles_of_a_sample():
    """Sequence s peaks at s + 1 of 2000: two weaker ones lie near three quarters and one quarter, within the sample's
    error.
    """
    n = 2000
    table_VD = torch.arange(n + 3.0)[:, None] - 2
    sequences = sequences_of([[BOS, 3, s + 3] for s in range(n)])
    pieces = [Latents.some_of(sae_of(torch.ones(1, 1), torch.ones(1, 1), 0.0), [0])]
    (peaks,) = find_peaks(pieces, TableModel(table_VD), sequences, 1.0, 8, 2, 32)
    assert [p.activation for p in peaks[:6]] == [n - i for i in range(6)] and [p.position for p in peaks[:6]] == [2] * 6
    error = 4 * (0.25 * 0.75 / SAMPLE) ** 0.5
    for peak, quantile in zip(peaks[6:], (0.75, 0.25), strict=True):
        assert peak.spread and abs(peak.activation / n - quantile) < error


def test_a_latent_for_one_word_peaks_at_that_word():
    """Before the first block the stream is the embedding: a latent along one token's fires there and nowhere else."""
    lm, word = load("tiny", "blocks.0.hook_resid_pre"), 777
    table_VD = lm.cut(torch.arange(4096)[None, :]).value_BTD[0]
    unit_D = table_VD[word] / table_VD[word].norm()
    p_V = table_VD @ unit_D
    others = float(torch.cat([p_V[:word], p_V[word + 1 :]]).max())
    assert others < float(p_V[word])
    sae = sae_of(unit_D[None], unit_D[None], theta=(others + float(p_V[word])) / 2)
    rng = np.random.default_rng(1)
    rows = [[BOS, *rng.integers(3, 700, n).tolist()] for n in rng.integers(5, 40, 30)]
    places = {3: 2, 11: 4, 29: 5}
    for s, t in places.items():
        rows[s][t] = word
    (peaks,) = find_peaks([Latents.some_of(sae, [0])], lm, sequences_of(rows), 1.0, 8, 2, 8)
    assert {p.sequence: p.position for p in peaks} == places
    assert all(p.activation == pytest.approx(float(p_V[word]), rel=1e-5) for p in peaks)


@pytest.mark.parametrize(
    "gate, core_size, transfer",
    [("batchtopk", 5, "frozen"), ("relu", 5, "frozen"), ("relu", 5, "init"), ("batchtopk", 0, "frozen")],
)
def test_some_latents_are_the_sae_s_own(gate, core_size, transfer):
    sae = random_sae(16, 32, 0.4, core_size=core_size, gate=gate)
    if transfer == "init":
        other = type(sae)(16, [32], core_size, gate, core_transfer="init")
        with torch.no_grad():
            other.encoder_rows().copy_(sae.encoder_rows())
            for name in ("b_enc", "W_dec", "b_dec", "theta"):
                getattr(other, name).copy_(getattr(sae, name))
        sae = other
    ids = [31, 4, 0, 17, 5]
    latents = Latents.some_of(sae, ids)
    x_BD = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(5))
    z_BL, truth_BL = latents.encode(x_BD), sae.encode(x_BD)[..., ids]
    assert torch.equal(z_BL > 0, truth_BL > 0) and 0 < int((z_BL > 0).sum()) < z_BL.numel()
    torch.testing.assert_close(z_BL, truth_BL)
    assert torch.equal(latents.W_dec_ND, sae.W_dec[ids])

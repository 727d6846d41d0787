import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference_sae import reference_mask
from thread_ranks import on_ranks

from dmsae_ray.sae.gate import kth_largest, select
from dmsae_ray.sae.ops.cpu_ops import NativePairs
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.collective import Alone
from dmsae_ray.sae.settings import SAESettings

OPS = {"torch": TorchPairs(), "compiled": NativePairs()}


def gate(p_BF, settings, core_size, comm=None, token_index_B=None, kernels="compiled", latent_ids_F=None):
    """Kept pairs as a mask, when every pair is a candidate, and the smallest kept value."""
    rows, width = p_BF.shape
    row_N, latent_N = (index.int() for index in torch.ones_like(p_BF).nonzero(as_tuple=True))
    n_exempt = core_size if settings.core_gate == "relu" else 0
    pairs, smallest = select(
        row_N,
        latent_N,
        p_BF.flatten(),
        rows,
        n_exempt,
        settings,
        OPS[kernels],
        comm or Alone(),
        token_index_B,
        latent_ids_F,
    )
    mask_BF = torch.zeros(p_BF.shape, dtype=torch.bool)
    mask_BF[pairs.row_N.long(), pairs.latent_N.long()] = True
    assert torch.equal(pairs.value_N, p_BF[mask_BF])
    assert torch.equal(pairs.start_B1.diff(), mask_BF.sum(dim=1))
    return mask_BF, smallest


def gate_over_ranks(p_BF, settings, core_size, rows_of_ranks):
    """The mask of the whole batch, from ranks that hold the given rows each."""

    def work(comm):
        rows = rows_of_ranks[comm.rank]
        return gate(p_BF[rows], settings, core_size, comm, rows)

    results = on_ranks(len(rows_of_ranks), work)
    mask_BF = torch.zeros(p_BF.shape, dtype=torch.bool)
    for rows, (mask, _) in zip(rows_of_ranks, results, strict=True):
        mask_BF[rows] = mask
    assert len({smallest for _, smallest in results}) == 1
    return mask_BF, results[0][1]


def gate_over_latents(p_BF, settings, core_size, ids_of_ranks):
    """The same from ranks that hold the given latents of all rows each."""

    def work(comm):
        ids = ids_of_ranks[comm.rank]
        return gate(p_BF[:, ids].contiguous(), settings, int((ids < core_size).sum()), comm, latent_ids_F=ids)

    results = on_ranks(len(ids_of_ranks), work)
    mask_BF = torch.zeros(p_BF.shape, dtype=torch.bool)
    for ids, (mask, _) in zip(ids_of_ranks, results, strict=True):
        mask_BF[:, ids] = mask
    assert len({smallest for _, smallest in results}) == 1
    return mask_BF, results[0][1]


@st.composite
def cases(draw):
    world = draw(st.sampled_from([1, 1, 2, 3]))
    tokens = world * draw(st.integers(1, 4))
    width = draw(st.integers(2, 7))
    core_size = draw(st.integers(0, width - 1))
    values = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 1.0, 2.0, 3.0])  # many ties, negatives, zeros
    p_BF = torch.tensor(
        draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=tokens, max_size=tokens))
    )
    settings = SAESettings(
        d=1,
        width=width,
        k=draw(st.integers(1, width)),
        batch=tokens,
        core_gate=draw(st.sampled_from(["batchtopk", "relu"])),
        core_budget=draw(st.sampled_from(["counted", "exempt"])),
    )
    order = torch.tensor(draw(st.permutations(range(tokens))))
    owner = torch.tensor(draw(st.lists(st.integers(0, world - 1), min_size=width, max_size=width)))
    ids_of_ranks = [(owner == rank).nonzero().flatten() for rank in range(world)]
    return p_BF, settings, core_size, list(order.split(tokens // world)), ids_of_ranks


@hypothesis_settings(max_examples=250, deadline=None)
@given(cases())
def test_selection_is_the_sort_based_definition_on_any_ranks(case):
    p_BF, settings, core_size, rows_of_ranks, ids_of_ranks = case
    expected, smallest = reference_mask(p_BF, settings.k, core_size, settings.core_gate, settings.core_budget)
    for mask_BF, least in (
        gate(p_BF, settings, core_size),
        gate(p_BF, settings, core_size, kernels="torch"),
        gate_over_ranks(p_BF, settings, core_size, rows_of_ranks),
        gate_over_latents(p_BF, settings, core_size, ids_of_ranks),
    ):
        assert torch.equal(mask_BF, expected)
        assert least == smallest


def test_budgets_of_an_exempt_core():
    p_BF = torch.ones(4, 10)
    kept = {}
    for budget in ("counted", "exempt"):
        settings = SAESettings(d=1, width=10, k=5, batch=4, core_gate="relu", core_budget=budget)
        kept[budget] = [int(gate(p_BF, settings, core_size)[0].sum()) for core_size in (0, 3, 6)]
    assert kept["counted"] == [20, 20, 24 + 4]  # a core above the budget leaves one free pair per token
    assert kept["exempt"] == [20, 12 + 20, 24 + 16]  # only 16 free pairs exist


def test_not_a_number_is_never_kept():
    p_BF = torch.tensor([[torch.nan, 1.0, 2.0], [torch.nan, torch.inf, -1.0]])
    mask_BF, smallest = gate(p_BF, SAESettings(d=1, width=3, k=1, batch=2), 0)
    assert mask_BF.tolist() == [[False, False, True], [False, True, False]]
    assert smallest == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_random_batch_keeps_the_largest(dtype):
    p_BF = torch.randn(300, 200, dtype=dtype, generator=torch.Generator().manual_seed(0))
    settings = SAESettings(d=1, width=200, k=7, batch=300)
    mask_BF, smallest = gate(p_BF, settings, 0)
    expected = p_BF.flatten().topk(2100).values
    assert torch.equal(p_BF[mask_BF].sort(descending=True).values, expected)
    assert smallest == expected[-1].item()


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_over_the_whole_range_of_floats(dtype, kernels):
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(3)
    exponents = torch.empty(500, dtype=dtype).uniform_(
        -140 if dtype == torch.float32 else -1000, 120, generator=generator
    )
    value = torch.cat(
        [
            torch.exp2(exponents),
            -torch.exp2(exponents),
            torch.tensor([0.0, info.tiny, info.tiny / 4, info.max, torch.inf, 1.0, 1.0], dtype=dtype),
        ]
    )
    descending = value.sort(descending=True).values
    for k in (1, 2, 3, 17, 250, int((value > 0).sum())):
        assert kth_largest(value, k, OPS[kernels]) == descending[k - 1].item()

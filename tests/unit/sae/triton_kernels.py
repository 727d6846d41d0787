"""Triton's kernels against their torch partners: run by test_triton.py in a process of its own.

Without a GPU they run in triton's interpreter, which has to be chosen before triton is imported.
"""

import copy
import dataclasses
import math
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import test_gate  # noqa: E402
import test_memory  # noqa: E402
import test_screen  # noqa: E402
import test_step  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import settings as hypothesis_settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from reference_sae import reference_mask  # noqa: E402

from dmsae_ray.sae import gate_on_device, loss, steps_on_device  # noqa: E402
from dmsae_ray.sae.cost.memory import footprint  # noqa: E402
from dmsae_ray.sae.gate import gate  # noqa: E402
from dmsae_ray.sae.kept import ScreenError  # noqa: E402
from dmsae_ray.sae.ops import cuda_ops  # noqa: E402
from dmsae_ray.sae.ops.pairs import AdamStep, Margin, Pairs  # noqa: E402
from dmsae_ray.sae.ops.torch_ops import TorchPairs  # noqa: E402
from dmsae_ray.sae.sae import MatryoshkaSAE  # noqa: E402
from dmsae_ray.sae.screen import Screen  # noqa: E402
from dmsae_ray.sae.step_report import Diverged  # noqa: E402
from dmsae_ray.sae.trainer import Trainer  # noqa: E402

if DEVICE == "cpu":
    import quick_interpreter

    quick_interpreter.hasten()

PLAIN = TorchPairs()
ADAM = AdamStep(0.9, 0.999, 1e-8, 3e-2, 1.7)


class Interpreted(cuda_ops.TritonPairs):
    """The interpreter multiplies bf16 numbers as if their bits were integers, so it is given them widened: the same
    products.
    """

    def append(self, left_BD, right_FD, *arguments):
        return super().append(left_BD.float(), right_FD.float(), *arguments)

    def sure_level(self, left_BD, right_FD, *arguments):
        return super().sure_level(left_BD.float(), right_FD.float(), *arguments)


def new_ops():
    return Interpreted() if DEVICE == "cpu" else cuda_ops.TritonPairs()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in every direction even of small problems; the interpreter's time goes by programs."""
    if DEVICE == "cpu":
        monkeypatch.setitem(cuda_ops.TILE, torch.float32, {"ROWS": 16, "LATENTS": 32, "DEPTH": 64, "TOGETHER": 2})
    monkeypatch.setattr(cuda_ops, "SPARSE", 32)
    monkeypatch.setattr(cuda_ops, "SAMPLED", {"PAIRS": 512, "BLOCK": 64})


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


@st.composite
def kept_pairs(draw):
    """A small SAE's weights, a batch and kept pairs: rows without any, rows and latents with very many, any groups, a
    frozen core.
    """
    rows, d = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 32, 45]))
    width = draw(st.sampled_from([4, 13, 50]))
    ends = sorted(draw(st.lists(st.integers(1, width), max_size=4))) + [width]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    share_B1 = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.02, 0.3, 1.0]), min_size=rows, max_size=rows)))[
        :, None
    ]
    mask_BF = torch.rand(rows, width, generator=generator) < share_B1
    mask_BF[:, 0] |= draw(st.booleans())
    row_N, latent_N = (index.int().to(DEVICE) for index in mask_BF.nonzero(as_tuple=True))

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    start_B1 = torch.searchsorted(row_N, torch.arange(rows + 1, dtype=torch.int32, device=DEVICE))
    pairs = Pairs(start_B1, row_N, latent_N, normal(len(row_N)).abs())
    return normal(rows, d), normal(d), normal(width, d), normal(width), pairs, ends, draw(st.integers(0, width)), normal


def check_sparse(case, padded, add):
    x_BD, b_D, W_FD, b_F, pairs, ends, n_frozen, normal = case
    ops, (width, d), n = new_ops(), W_FD.shape, len(pairs.row_N)
    centred_BD, _ = PLAIN.centre(x_BD, b_D, False)
    close(
        ops.values(centred_BD, W_FD, b_F, pairs.row_N, pairs.latent_N),
        PLAIN.values(centred_BD, W_FD, b_F, pairs.row_N, pairs.latent_N),
    )

    ours = pairs
    if padded:
        ends_of = (
            pairs.row_N.new_full((5,), len(x_BD)),
            pairs.latent_N.new_full((5,), width),
            pairs.value_N.new_zeros(5),
        )
        ours = Pairs(pairs.start_B1, *(torch.cat([part, end]) for part, end in zip(pairs[1:], ends_of, strict=True)))
    S_BGD, expected_S = (normal(len(x_BD), len(ends), d) for _ in range(2))
    gradient_N, loss_B = ops.decode(x_BD, b_D, W_FD, ours, ends, S_BGD)
    expected_N, expected_B = PLAIN.decode(x_BD, b_D, W_FD, pairs, ends, expected_S)
    close(S_BGD, expected_S)
    close(gradient_N[:n], expected_N)
    close(loss_B, expected_B)

    before = [normal(width - n_frozen, d), normal(width), normal(width, d)]
    found, expected, again = ([tensor.clone() for tensor in before] for _ in range(3))
    for which, kept, given_N, into in ((ops, ours, gradient_N, found), (PLAIN, pairs, expected_N, expected)):
        start_F1, order_N = which.by_latent(kept.latent_N, width)
        which.weight_gradients(
            expected_S, centred_BD, kept, given_N, start_F1, order_N, ends, n_frozen, 0.37, *into, add=add
        )
    for ours_, theirs in zip(found, expected, strict=True):
        close(ours_, theirs)
    if DEVICE == "cuda":  # the interpreter has no other order than one
        start_F1, order_N = ops.by_latent(ours.latent_N, width)
        ops.weight_gradients(
            expected_S, centred_BD, ours, gradient_N, start_F1, order_N, ends, n_frozen, 0.37, *again, add=add
        )
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits every time"


@pytest.mark.parametrize("examples", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_values_decode_and_gradients(examples):
    chosen = hypothesis_settings(max_examples=examples, deadline=None, derandomize=True)
    chosen(given(kept_pairs(), st.booleans(), st.booleans())(check_sparse))()


@pytest.mark.parametrize("shapes", [((1, 300), (100, 2)), pytest.param(((200, 2),), marks=pytest.mark.slow)])
def test_a_row_and_a_latent_with_hundreds_of_pairs_and_one_group(shapes):
    generator = torch.Generator().manual_seed(0)
    for rows, width in shapes:
        x_BD, W_FD = (
            torch.randn(rows, 20, generator=generator).to(DEVICE),
            torch.randn(width, 20, generator=generator).to(DEVICE),
        )
        b_D = torch.zeros(20, device=DEVICE)
        row_N, latent_N = (index.int() for index in torch.ones(rows, width, device=DEVICE).nonzero(as_tuple=True))
        start_B1 = torch.arange(rows + 1, device=DEVICE) * width
        pairs = Pairs(start_B1, row_N, latent_N, torch.rand(rows * width, generator=generator).to(DEVICE))
        results = []
        for ops in (new_ops(), PLAIN):
            S_BGD, gradients = (
                x_BD.new_empty(rows, 1, 20),
                [torch.empty_like(W_FD), W_FD.new_empty(width), torch.empty_like(W_FD)],
            )
            gradient_N, loss_B = ops.decode(x_BD, b_D, W_FD, pairs, [width], S_BGD)
            ops.weight_gradients(
                S_BGD, x_BD, pairs, gradient_N, *ops.by_latent(latent_N, width), [width], 0, 1.0, *gradients
            )
            results.append([S_BGD, gradient_N, loss_B, *gradients])
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 1), (5, 45), (3, 64), (9, 130)])
def test_rows_are_rounded_and_centred(shape):
    ops, generator = new_ops(), torch.Generator().manual_seed(0)
    x_ND = (torch.randn(*shape, generator=generator) * torch.logspace(-18, 12, shape[0])[:, None]).to(DEVICE)
    x_ND[0, 0] = 1 + 2.0**-8  # halfway between two bf16 numbers, as is the next
    if shape[0] > 4:
        x_ND[0, 1], x_ND[1, 0], x_ND[2, 0], x_ND[3, 0] = 1 + 3 * 2.0**-8, math.nan, -math.inf, 3.4e38
        x_ND.view(torch.int32)[1, 1] = 0x7FFFFFFF  # NaN, too; rounding its bits up would make it a zero
    b_D = torch.randn(shape[1], generator=generator).to(DEVICE)
    for low in (True, False):
        for (ours_ND, ours), (theirs_ND, theirs) in (
            (ops.centre(x_ND, b_D, low), PLAIN.centre(x_ND, b_D, low)),
            ((x_ND, ops.round(x_ND, low)), (x_ND, PLAIN.round(x_ND, low))),
        ):
            assert torch.equal(ours_ND.view(torch.int32), theirs_ND.view(torch.int32))
            if low:
                assert torch.equal(ours.low_ND.isnan(), theirs.low_ND.isnan())
                assert torch.equal(ours.low_ND.nan_to_num(), theirs.low_ND.nan_to_num())
            for name in ("norm_N", "error_N"):
                torch.testing.assert_close(
                    getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=0, equal_nan=True
                )


@pytest.mark.parametrize("shape", [(1, 1), (6, 45), (4, 64)])
@pytest.mark.parametrize("unit", [True, False])
def test_the_update_in_one_pass(shape, unit):
    ops, generator = new_ops(), torch.Generator().manual_seed(1)
    W, gradient, mean = (torch.randn(*shape, generator=generator).to(DEVICE) for _ in range(3))
    square = mean.square()
    squares, along_N = ops.gradient_squares(gradient, W)
    expected, expected_N = PLAIN.gradient_squares(gradient, W)
    close(squares, expected)
    close(along_N, expected_N)
    close(ops.gradient_squares(gradient, None)[0], PLAIN.gradient_squares(gradient, None)[0])

    states = [[tensor.clone() for tensor in (W, gradient, mean, square)] for _ in range(3)]
    copies = [PLAIN.round(W, shape[0] != 4) for _ in range(3)]
    parallel_N = expected_N if unit else None
    ops.adam(*states[0], parallel_N, torch.tensor(0.3, device=DEVICE), ADAM, unit, copies[0])
    PLAIN.adam(*states[1], parallel_N, 0.3, ADAM, unit, copies[1])
    for ours, theirs in zip(states[0], states[1], strict=True):
        close(ours, theirs, 1e-6)
    fresh = PLAIN.round(states[0][0], shape[0] != 4)
    assert fresh.low_ND is None or torch.equal(copies[0].low_ND, fresh.low_ND)
    torch.testing.assert_close(copies[0].norm_N, fresh.norm_N)
    torch.testing.assert_close(copies[0].error_N, fresh.error_N)

    ops.adam(*states[2], parallel_N, math.nan, ADAM, unit, copies[2], torch.tensor(0, dtype=torch.int32, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(states[2], (W, gradient, mean, square), strict=True)), (
        "nothing where `go` is 0"
    )
    assert torch.equal(copies[2].norm_N, PLAIN.round(W, False).norm_N)


def test_a_vector_is_updated_in_full():
    for length in (1, cuda_ops.FLAT, 2 * cuda_ops.FLAT + 77):
        states = [
            [torch.linspace(-1, 1, length + 1, device=DEVICE)[:length] * n for n in (1, 2, 3, 4)] for _ in range(2)
        ]
        for ops, state in zip((new_ops(), PLAIN), states, strict=True):
            state[3].abs_()
            ops.adam(*state, None, 0.5, ADAM, False, None)
        for ours, theirs in zip(*states, strict=True):
            close(ours, theirs, 1e-6)


def test_digits_and_the_kth_largest_over_the_whole_range_of_floats():
    ops, generator = new_ops(), torch.Generator().manual_seed(3)
    size = torch.exp2(torch.empty(700).uniform_(-140, 120, generator=generator))
    info = torch.finfo(torch.float32)
    value_N = torch.cat(
        [size, -size, torch.tensor([0.0, info.tiny, info.tiny / 4, info.max, math.inf, math.nan, 1.0, 1.0])]
    ).to(DEVICE)
    for shift, prefix in ((22, 0), (11, 254), (0, 130048)):
        assert torch.equal(ops.count_digits(value_N, shift, prefix), PLAIN.count_digits(value_N, shift, prefix))
    descending = value_N[value_N > 0].sort(descending=True).values
    for k in (1, 2, 3, 17, 250, len(descending)):
        assert ops.kth_largest(value_N, torch.tensor(k, device=DEVICE)) == descending[k - 1]
    assert ops.kth_largest(value_N, torch.tensor(len(descending) + 1, device=DEVICE)) == 0


@pytest.mark.parametrize("n_exempt", [0, 7])
def test_the_screen_appends_what_scan_finds_sorted(n_exempt):
    ops, generator = new_ops(), torch.Generator().manual_seed(0)
    x_BD, W_FD = (torch.randn(n, 70, generator=generator).to(DEVICE) for n in (37, 90))
    b_F = torch.randn(90, generator=generator).to(DEVICE)
    x_BD[3, 5], x_BD[11] = math.nan, 0.0
    rows, latents = PLAIN.round(x_BD, True), PLAIN.round(W_FD, True)
    row_a_B = rows.error_N + 1e-3 * rows.norm_N
    row_a_B[7] = math.inf  # a row that the screen says nothing about
    margin = Margin(row_a_B, rows.norm_N, 0.0, 1e-6, 1e-30)
    product_BF = rows.low_ND.float() @ latents.low_ND.float().t()
    for cut in (0.0, 4.0, math.inf):
        expected = PLAIN.scan(product_BF, 0, b_F, latents, margin, cut, n_exempt)
        found = ops.screened(rows.low_ND, latents.low_ND, b_F, latents, margin, cut, n_exempt)
        assert torch.equal(found.row_N, expected.row_N) and torch.equal(found.latent_N, expected.latent_N)
        assert (found.row_N == 7).sum() == (found.row_N == 3).sum() == 90
        for ours, theirs in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    # Beyond the places pairs are counted and not stored; where told so, nothing is done.
    cut = b_F.new_full((), 4.0)
    expected = PLAIN.scan(product_BF, 0, b_F, latents, margin, 4.0, n_exempt)
    first = ops.append(rows.low_ND, latents.low_ND, b_F, latents, margin, cut, n_exempt, 50)
    assert first[1] == len(expected.row_N) > 50 and (first[0].row_N < 37).all()
    off = torch.tensor(0, dtype=torch.int32, device=DEVICE)
    same = ops.append(rows.low_ND, latents.low_ND, b_F, latents, margin, cut, n_exempt, 50, off, first)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip((*first[0], first[1]), (*same[0], same[1]), strict=True)
    )


def test_a_level_is_reached_by_so_many_and_less_than_an_eighth_below_the_highest():
    ops, generator = new_ops(), torch.Generator().manual_seed(0)
    x_BD, W_FD = (torch.randn(n, 40, generator=generator).to(DEVICE) for n in (20, 64))
    zero_B, zero_F = x_BD.new_zeros(20), x_BD.new_zeros(64)
    margin, latents = Margin(zero_B, zero_B, 0.0, 0.0, 0.5), PLAIN.round(W_FD, False)
    sure = ((x_BD @ W_FD.t())[:, 5:] - 0.5).flatten().sort(descending=True).values
    go = torch.tensor(1, dtype=torch.int32, device=DEVICE)
    for wanted in (1, 10, 300):
        level = float(ops.sure_level(x_BD, W_FD, zero_F, latents, margin, 5, torch.tensor(wanted, device=DEVICE), go))
        assert sure[wanted - 1] * 8 / 9 <= level <= sure[wanted - 1] * (1 + 1e-6)
    assert ops.sure_level(x_BD, W_FD, zero_F, latents, margin, 5, torch.tensor(2000, device=DEVICE), go) == 0
    assert ops.sure_level(x_BD, W_FD, zero_F, latents, margin, 5, torch.tensor(1, device=DEVICE), go * 0) == 0


@pytest.fixture
def on_device(monkeypatch):
    """test_screen.py's cases with these kernels."""
    monkeypatch.setitem(test_screen.OPS, "triton", new_ops())
    if DEVICE == "cuda":
        real = test_screen.case
        monkeypatch.setattr(
            test_screen, "case", lambda *a, **k: (lambda sae, s, x: (sae.cuda(), s, x.cuda()))(*real(*a, **k))
        )
    return test_screen.OPS["triton"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of infinities that are meant
@pytest.mark.parametrize(
    ("kind", "gate_of_core"),
    [
        # Every kind each time, with one of the two; with the other one only in `make test-all`.
        pytest.param(kind, gate_of_core, marks=[pytest.mark.slow] if (place + (gate_of_core == "relu")) % 2 else [])
        for place, kind in enumerate(test_screen.KINDS)
        for gate_of_core in ("batchtopk", "relu")
    ],
)
def test_kept_pairs_are_the_defined_ones(kind, gate_of_core, on_device):
    relu = gate_of_core == "relu"
    seed = 3 if relu else list(test_screen.KINDS).index(kind) % 3
    sae, settings, x_BD = test_screen.case(
        kind, seed, d=70, width=60, batch=16, k=[3, 7, 30, 50][seed], core=[0, 5, 9, 4][seed], core_gate=gate_of_core
    )
    mode = ["bf16", "fp32"][len(kind) % 2] if relu else "bf16"
    test_screen.check(sae, settings, x_BD, "triton", mode, [0.3, None, math.inf, 30.0][seed])


def test_a_good_guess_needs_one_scan_and_bad_ones_a_second(on_device):
    sae, settings, x_BD = test_screen.case("gaussian", 0, d=64, width=96, batch=24, k=3, core=0)
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=1, keepdim=True))
    first, p_BF = test_screen.check(sae, settings, x_BD, "triton", "bf16", None)
    assert (
        first.retries == 1 and first.candidates < 2.5 * 3 * 24 and 0.9 * first.smallest < first.bound <= first.smallest
    )
    good, _ = test_screen.check(sae, settings, x_BD, "triton", "bf16", 0.97 * first.bound)
    assert good.retries == 0 and good.bound == first.bound
    low, _ = test_screen.check(sae, settings, x_BD, "triton", "bf16", 1e-6)
    assert low.retries == 1 and low.bound == first.bound, "too many candidates for their places"
    high, _ = test_screen.check(sae, settings, x_BD, "triton", "bf16", 2 * float(p_BF.max()))
    assert high.retries == 1 and high.bound == first.bound


def test_too_few_places_are_seen_and_more_are_made(on_device, monkeypatch):
    monkeypatch.setattr(gate_on_device, "PLACES", 1)
    sae, settings, x_BD = test_screen.case(
        "gaussian", 0, d=70, width=70, batch=20, k=40, core=0
    )  # fewer positive pairs than k * B
    screen, b_D = Screen(sae, on_device, "bf16"), sae.b_dec.detach()
    centred_BD, rows = on_device.centre(x_BD, b_D, True)
    kept = gate(centred_BD, rows, screen, settings, guess=x_BD.new_tensor(5.0))
    assert not kept.short  # half of the pairs are positive: 700 of 800 places
    settings = dataclasses.replace(settings, k=20)
    assert gate(centred_BD, rows, screen, settings, guess=x_BD.new_tensor(5.0)).short and on_device.places == 0
    kept, _ = test_screen.check(sae, settings, x_BD, "triton", "bf16", 5.0)
    assert on_device.places >= kept.candidates > 400


def test_a_product_that_is_off_by_more_than_its_margin_is_an_error(on_device):
    sae, settings, x_BD = test_screen.case("gaussian", 0, d=64, width=80, batch=20, k=4, core=0)
    screen = Screen(sae, on_device, "bf16")
    screen.latents().low_ND[7] *= 1.1
    centred_BD, rows = on_device.centre(x_BD, sae.b_dec.detach(), True)
    with pytest.raises(ScreenError, match="train.screen"):
        gate(centred_BD, rows, screen, settings)


@st.composite
def tied_cases(draw):
    """Values of few distinct numbers, for any budget, core, and order of the tokens."""
    p_BF, settings, core_size, rows_of_ranks, *_ = draw(test_gate.cases())
    order = torch.cat(rows_of_ranks)
    return p_BF, settings, core_size, order


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(tied_cases(), st.integers(0, 3))
def check_selection(case, padding):
    p_BF, settings, core_size, order = case
    expected, smallest = reference_mask(p_BF, settings.k, core_size, settings.core_gate, settings.core_budget)
    rows, width = p_BF.shape
    mine_BF = p_BF[order].to(DEVICE)  # this worker's rows, and their places in the batch
    row_N, latent_N = (index.int() for index in torch.ones_like(mine_BF).nonzero(as_tuple=True))
    end = (torch.full((padding,), n, dtype=torch.int32, device=DEVICE) for n in (rows, width))
    row_C, latent_C = (torch.cat(parts) for parts in zip((row_N, latent_N), end, strict=True))
    value_C = torch.cat([mine_BF.flatten(), torch.full((padding,), -1.0, device=DEVICE)])
    n_exempt = core_size if settings.core_gate == "relu" else 0
    pairs, least = gate_on_device.select_on_device(row_C, latent_C, value_C, rows, n_exempt, settings, new_ops(), order)
    n = int(pairs.start_B1[-1])
    found = torch.zeros_like(expected)
    found[order[pairs.row_N[:n].long().cpu()], pairs.latent_N[:n].long().cpu()] = True
    assert torch.equal(found, expected) and least == smallest
    assert torch.equal(pairs.value_N[:n], mine_BF[pairs.row_N[:n].long(), pairs.latent_N[:n].long()])
    assert torch.equal(pairs.start_B1.diff().cpu(), expected[order].sum(dim=1))
    assert (pairs.row_N[n:] == rows).all() and (pairs.latent_N[n:] == width).all() and (pairs.value_N[n:] == 0).all()
    assert len(pairs.row_N) == min(gate_on_device.kept_places(settings, rows, n_exempt), len(row_C))


def test_selection_is_the_sort_based_definition():
    check_selection()


@pytest.fixture
def in_training(monkeypatch):
    """Trainers get these kernels; `ops` are the last one's."""
    made = []

    def pairs_on(device, kernels, dtype):
        made.append(PLAIN if kernels == "torch" else new_ops())
        return made[-1]

    monkeypatch.setattr(loss, "pairs_on", pairs_on)
    if DEVICE == "cuda":
        real = MatryoshkaSAE.init
        monkeypatch.setattr(MatryoshkaSAE, "init", staticmethod(lambda *arguments: real(*arguments).cuda()))
        monkeypatch.setattr(test_step, "batches", lambda *a, real=test_step.batches, **k: real(*a, **k).cuda())
    return made


CASES = {
    "plain": {},
    "core trained": {"core_transfer": "init"},
    "core exempt": {"core_gate": "relu"},
    "budget exempt, many dead": {"core_gate": "relu", "core_budget": "exempt", "dead_window_tokens": 16, "auxk_k": 2},
    "no AuxK": {"auxk_alpha": 0.0, "dead_window_tokens": 16, "screen": "fp32"},
    "micro-batches": {"micro_batch": 7},
    "decoder frozen, penalty, sampled": {**test_step.FROZEN_DECODER, "l2": 0.01, "prefixes": "sampled"},
}


EACH_TIME = ("core exempt", "budget exempt, many dead", "micro-batches")
"""Cases of the short form; the interpreter is slow, so the others are only in `make test-all`."""


@pytest.mark.parametrize(
    "case", [case if case in EACH_TIME else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_training_is_that_of_plain_torch(case, in_training):
    settings = dataclasses.replace(test_step.SETTINGS, screen="bf16", clip=0.3)
    settings = dataclasses.replace(settings, **CASES[case])
    ours = test_step.new_trainer(settings=settings)
    theirs = test_step.new_trainer(settings=dataclasses.replace(settings, kernels="torch"))
    assert (ours.loss.ops.name, theirs.loss.ops.name) == ("triton", "torch")
    order_B = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for x_BD in test_step.batches(4):
        found, expected = (vars(trainer.step(x_BD, order_B, log=True)) for trainer in (ours, theirs))
        for name in ("candidates", "retries"):
            found.pop(name), expected.pop(name)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    if case == "budget exempt, many dead":
        assert found["loss_aux"] > 0 and ours.state_dict()["dead_places"] > 0
    found, expected = ours.state_dict(), theirs.state_dict()
    assert torch.equal(found["silent"], expected["silent"]) and found["adam"]["steps"] == 4
    assert found["threshold_sum"] == pytest.approx(expected["threshold_sum"], rel=1e-4)
    for name, tensor in expected["sae"].items():
        torch.testing.assert_close(
            found["sae"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_training_stops_resumes_and_logs_as_it_does_elsewhere(in_training, monkeypatch):
    test_step.test_a_batch_that_is_not_finite_stops_before_any_weight_changes(math.nan, 1)
    test_step.test_an_exploding_loss_and_a_gradient_that_is_not_finite_stop_the_run(monkeypatch)
    monkeypatch.setattr(test_step, "batches", lambda count, real=test_step.batches: real(count)[:3])
    test_step.test_logging_changes_no_state_and_reports_the_batch()
    straight, first = (test_step.new_trainer() for _ in range(2))
    x = test_step.batches(3)
    for x_BD in x:
        straight.step(x_BD)
    for x_BD in x[:2]:
        first.step(x_BD)
    second = test_step.new_trainer(seed=5)
    second.load_state_dict(first.state_dict())
    for x_BD in x[2:]:
        second.step(x_BD)
    test_step.assert_same(second.state_dict(), straight.state_dict())
    assert all(ops.name == "triton" for ops in in_training)


@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_steps_launched_ahead_are_those_taken_one_by_one(in_training, steps):
    settings = dataclasses.replace(test_step.SETTINGS, screen="bf16", dead_window_tokens=32, auxk_k=2)
    ahead, one_by_one = (test_step.new_trainer(settings=settings) for _ in range(2))
    x = test_step.batches(steps + 2)
    for step, x_BD in enumerate(x[:steps]):
        ahead.step(x_BD)
        one_by_one.step(x_BD)
        one_by_one.settle()
        assert (ahead.steps_done, one_by_one.steps_done) == (step, step + 1)
    state = copy.deepcopy(ahead.state_dict())
    test_step.assert_same(state, one_by_one.state_dict())
    assert ahead.steps_done == steps and state["dead_places"] == 128

    # From its state training goes on with as many places, whatever the latents at hand would ask for.
    resumed = test_step.new_trainer(settings=settings, seed=5)
    resumed.load_state_dict(state | {"dead_places": 256})
    assert resumed.state_dict()["dead_places"] == 256
    resumed.step(x[steps])
    assert resumed.state_dict()["dead_places"] == 128
    resumed.load_state_dict({name: value for name, value in state.items() if name != "dead_places"})  # a CPU's
    for x_BD in x[steps:]:
        resumed.step(x_BD)
        ahead.step(x_BD)
    test_step.assert_same(resumed.state_dict(), ahead.state_dict())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_wrong_with_a_batch_is_known_one_batch_later(in_training):
    straight, trainer = test_step.new_trainer(), test_step.new_trainer()
    x = test_step.batches(4)
    bad = x[2].clone()
    bad[3, 2] = bad[9, 0] = math.nan
    for x_BD in (*x[:2], bad):
        trainer.step(x_BD)
    with pytest.raises(Diverged, match="step 2") as raised:
        trainer.step(x[3])
    assert (raised.value.rows, raised.value.behind, trainer.steps_done) == ((3, 9), 1, 2)
    for x_BD in x:
        straight.step(x_BD)
    for x_BD in x[2:]:  # a good one in its place, and all goes on
        trainer.step(x_BD)
    test_step.assert_same(trainer.state_dict(), straight.state_dict())


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="reads the CPU's allocator")
def test_the_footprint_bounds_what_a_step_allocates(in_training, monkeypatch):
    monkeypatch.setitem(cuda_ops.TILE, torch.float32, {"ROWS": 256, "LATENTS": 256, "DEPTH": 64, "TOGETHER": 2})
    monkeypatch.setattr(cuda_ops, "SPARSE", 128)
    settings = dataclasses.replace(
        test_memory.SETTINGS, d=64, width=256, k=4, batch=128, screen="fp32"
    )  # bf16 would be widened here
    sae, x = test_memory.new_sae(settings), test_memory.batches(2, settings).unbind()
    made = []

    def run():
        made.append(Trainer(sae, settings))
        for x_BD in x:
            made[0].step(x_BD)

    measured = test_memory.peak(test_memory.allocations(run))
    expected = footprint(settings, test_memory.CORE, world=1, low_screen=False, fused=True)
    expected.pop("weights"), expected.update(rows=expected["rows"] - settings.batch * settings.d * 4)  # there before
    assert 0.8 * sum(expected.values()) < measured < 1.1 * sum(expected.values()), (measured, expected)


@pytest.mark.slow
def test_a_step_that_was_short_of_places_is_made_again_and_leaves_no_trace(in_training, monkeypatch):
    settings = dataclasses.replace(test_step.SETTINGS, k=12, screen="bf16", dead_window_tokens=32)
    roomy, tight = (test_step.new_trainer(settings=settings) for _ in range(2))
    for trainer in (roomy, tight):
        with torch.no_grad():
            trainer.sae.b_enc[20:] = -5.0  # dead after two steps
    launched = []
    launch = steps_on_device.launch_step
    monkeypatch.setattr(
        steps_on_device, "launch_step", lambda *arguments: launched.append(arguments[4]) or launch(*arguments)
    )
    for step, x_BD in enumerate(test_step.batches(3)):
        monkeypatch.setattr(gate_on_device, "PLACES", 4)
        roomy.step(x_BD)
        launched.clear()
        monkeypatch.setattr(gate_on_device, "PLACES", 0)
        tight.loss.ops.places = 20
        if step == 0:
            tight._ahead.dead_places()  # counts them
        tight._ahead._places[0] = 0
        tight.step(x_BD)
        # A step is seen, and found short, when the next is launched: both are launched again, as often as it takes.
        assert launched == [0] if step == 0 else launched[:3] == [step, step - 1, step] and launched[-1] == step
        assert tight.adam.steps == step + 1
    tight.settle()
    assert tight.loss.ops.places > 20 and tight._ahead.dead_places() == 128
    test_step.assert_same({**roomy.state_dict(), "dead_places": 128}, tight.state_dict())

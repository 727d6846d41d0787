import copy
import dataclasses
import io
import math

import pytest
import torch
from reference_sae import reference_mask
from test_loss import NAMES, random_case, reference_of

from dmsae_ray.sae.median import geometric_median
from dmsae_ray.sae.ops import native
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.step_report import Diverged
from dmsae_ray.sae.trainer import Trainer

SETTINGS = SAESettings(
    d=6,
    width=24,
    k=2,
    batch=16,
    lr=3e-3,
    warmup_steps=3,
    decay_steps=5,
    total_steps=20,
    dead_window_tokens=48,
    threshold_start_step=3,
    threshold_beta=0.9,
)

INIT = dataclasses.replace(SETTINGS, core_transfer="init")
FROZEN_DECODER = {"decoder": "frozen_random", "core_decoder_init": "random"}


def batches(count, settings=SETTINGS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, settings.batch, settings.d, generator=generator, dtype=dtype) / settings.d**0.5
    return x + 0.2


def new_trainer(core_size=3, settings=SETTINGS, seed=0):
    core = torch.randn(core_size, settings.d, generator=torch.Generator().manual_seed(99))
    return Trainer(MatryoshkaSAE.init(settings, torch.nn.functional.normalize(core, dim=1), seed), settings)


def assert_same(a, b):
    """Equal to the last bit, however nested."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("variant", [{}, FROZEN_DECODER, {"l2": 0.03}], ids=["plain", "frozen decoder", "l2"])
@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
@pytest.mark.parametrize("seed", range(12))
def test_whole_updates_are_those_of_the_reference(seed, core_transfer, variant):
    sae, settings, _, _, generator = random_case(seed, core_transfer)
    settings = dataclasses.replace(
        settings, clip=[1.0, 0.05][seed % 2], threshold_start_step=1, threshold_beta=0.8, **variant
    )
    reference = reference_of(sae, settings)
    trainer = Trainer(sae, settings)
    values = []
    for step in range(9):
        x_BD = torch.randn(settings.batch, settings.d, dtype=torch.float64, generator=generator)
        loss, mask, smallest = reference.update(x_BD)
        report = trainer.step(x_BD, log=True)
        values += [smallest] if step > 1 else []
        assert report.loss == pytest.approx(loss, rel=1e-9)
        assert report.l0 == pytest.approx(mask.sum().item() / settings.batch)
        assert report.core_l0 == pytest.approx(mask[:, : sae.core_size].sum().item() / settings.batch)
        assert report.l0 == pytest.approx(report.core_l0 + report.free_l0)
    weights = [0.8**age for age in reversed(range(len(values)))]
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    assert trainer.threshold == pytest.approx(mean) == sae.theta.item()
    assert torch.equal(trainer.silent_F, reference.silent)
    for name in NAMES:
        ours = sae.encoder() if name == "W_enc" else getattr(sae, name)
        torch.testing.assert_close(
            ours, reference.parameters[name], rtol=0, atol=1e-9, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_sampled_prefixes_are_what_has_to_reconstruct(kernels):
    sae, settings, _, _, generator = random_case(4)
    settings = dataclasses.replace(settings, kernels=kernels, prefixes="sampled", prefix_seed=8)
    reference, trainer, seen = reference_of(sae, settings), Trainer(sae, settings), set()
    for step in range(9):
        x_BD = torch.randn(settings.batch, settings.d, dtype=torch.float64, generator=generator)
        reference.group_ends = trainer.loss.prefixes.ends(step)
        seen.add(tuple(reference.group_ends))
        assert trainer.step(x_BD, log=True).loss == pytest.approx(reference.update(x_BD)[0], rel=1e-9)
    assert len(seen) > 2 and {len(ends) for ends in seen} == {len(sae.group_ends)}
    torch.testing.assert_close(sae.W_dec.detach(), reference.parameters["W_dec"], rtol=0, atol=1e-9)


def test_first_step_only_moves_b_dec_to_the_geometric_median():
    trainer = new_trainer()
    before = copy.deepcopy(trainer.sae.state_dict())
    x_BD = batches(1)[0]
    report = trainer.step(x_BD, log=True)
    assert report.lr == 0
    after = trainer.sae.state_dict()
    torch.testing.assert_close(after["b_dec"], geometric_median(x_BD))
    for name in ("W_enc", "b_enc", "W_enc_core", "theta"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["W_dec"], before["W_dec"])


def test_geometric_median_minimises_summed_distance_and_survives_equal_rows():
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    median = geometric_median(points)
    best = (points - median).norm(dim=1).sum()
    for direction in torch.eye(3, dtype=torch.float64):
        for sign in (-1, 1):
            assert (points - median - sign * 1e-2 * direction).norm(dim=1).sum() > best
    torch.testing.assert_close(geometric_median(torch.ones(5, 2)), torch.ones(2))


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("settings", [SETTINGS, INIT], ids=["frozen", "init"])
def test_core_encoder_stays_where_it_is_frozen_and_everything_else_moves(settings, kernels):
    trainer = new_trainer(settings=dataclasses.replace(settings, kernels=kernels))
    before, rows_before = copy.deepcopy(trainer.sae.state_dict()), trainer.sae.encoder_rows().clone()
    for x_BD in batches(12):
        trainer.step(x_BD)
    after = trainer.sae.state_dict()
    assert torch.equal(after["W_enc_core"], before["W_enc_core"]) and len(after["W_enc_core"]) == (
        3 if settings is SETTINGS else 0
    )
    stayed_F = (trainer.sae.encoder_rows() == rows_before).all(dim=1)
    assert stayed_F.nonzero().flatten().tolist() == ([0, 1, 2] if settings is SETTINGS else []), (
        "every other row is trained"
    )
    for name in NAMES:
        assert not torch.equal(after[name], before[name])
    assert not torch.equal(after["W_dec"][:3], before["W_dec"][:3])
    torch.testing.assert_close(after["W_dec"].norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_frozen_decoder_rows_stay_to_the_bit_and_are_no_part_of_the_norm(kernels):
    learned, frozen = (
        new_trainer(settings=dataclasses.replace(SETTINGS, kernels=kernels, **more))
        for more in ({"core_decoder_init": "random"}, FROZEN_DECODER)
    )
    before = frozen.sae.W_dec.detach().clone()
    assert torch.equal(before, learned.sae.W_dec), "both start alike"
    reports = [[trainer.step(x_BD, log=True) for x_BD in batches(12)] for trainer in (learned, frozen)]
    assert torch.equal(frozen.sae.W_dec, before) and not torch.equal(learned.sae.W_dec, before)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(24))
    assert reports[1][0].loss == reports[0][0].loss and reports[1][0].grad_norm < reports[0][0].grad_norm
    assert not frozen.sae.views(frozen.adam.square)[2].any() and frozen.sae.W_enc.isfinite().all()
    assert frozen.threshold > 0 and frozen.sae.theta.item() == frozen.threshold


def test_a_core_keeps_its_decoder_rows_where_that_is_asked_for():
    core_CD = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))
    rows_CD = torch.nn.functional.normalize(core_CD.flip(1), dim=1)
    kept, random = (
        MatryoshkaSAE.init(dataclasses.replace(SETTINGS, core_decoder_init=how), core_CD, 0, core_W_dec_CD=rows_CD)
        for how in ("kept", "random")
    )
    assert torch.equal(kept.W_dec[:3], rows_CD) and torch.equal(kept.W_dec[3:], random.W_dec[3:])
    assert torch.equal(kept.encoder_rows(), random.encoder_rows())


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_the_penalty_draws_encoder_rows_in_and_nothing_else(kernels):
    plain, small, large = (
        new_trainer(settings=dataclasses.replace(SETTINGS, kernels=kernels, l2=l2)) for l2 in (0.0, 1e-3, 0.1)
    )
    reports = [[trainer.step(x_BD, log=True) for x_BD in batches(12)] for trainer in (plain, small, large)]
    assert reports[0][0].loss == reports[2][0].loss, "what is logged is the loss without the penalty"
    norms = [trainer.sae.W_enc.norm(dim=1).mean().item() for trainer in (plain, small, large)]
    assert norms[0] > norms[1] > norms[2]
    assert torch.equal(large.sae.W_enc_core, plain.sae.W_enc_core), "frozen rows are not penalised"
    torch.testing.assert_close(large.sae.W_dec.norm(dim=1), torch.ones(24))


def test_a_core_that_is_trained_starts_as_a_frozen_one_and_is_a_core_all_the_same():
    frozen, trained = new_trainer(), new_trainer(settings=INIT)
    assert torch.equal(trained.sae.encoder_rows(), frozen.sae.encoder_rows()) and torch.equal(
        trained.sae.W_dec, frozen.sae.W_dec
    )
    assert (trained.sae.core_size, trained.sae.group_ends) == (frozen.sae.core_size, frozen.sae.group_ends)
    assert trained.sae.flat.numel() == frozen.sae.flat.numel() + 3 * 6
    x_BD = batches(1)[0]
    ours, theirs = trained.step(x_BD, log=True), frozen.step(x_BD, log=True)  # at learning rate 0
    assert (ours.loss, ours.core_l0, ours.free_l0) == (theirs.loss, theirs.core_l0, theirs.free_l0) and ours.core_l0 > 0
    assert ours.grad_norm > theirs.grad_norm, "the core's encoder gradient is in the norm that is clipped"
    # Silent core latents are no dead latents, for AuxK revives free ones.
    with torch.no_grad():
        trained.sae.b_enc[:3] = -10.0
    shares = [trained.step(x_BD, log=True) for x_BD in batches(5)]
    assert (trained.silent_F[:3] >= INIT.dead_window_tokens).all() and all(report.core_l0 == 0 for report in shares)
    assert shares[-1].dead_share == (trained.silent_F[3:] >= INIT.dead_window_tokens).double().mean().item()


@pytest.mark.parametrize("settings", [SETTINGS, INIT], ids=["frozen", "init"])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_resumed_run_is_bit_identical(through_file, settings):
    x = batches(20)
    straight = new_trainer(settings=settings)
    for x_BD in x:
        straight.step(x_BD)

    first = new_trainer(settings=settings)
    for x_BD in x[:10]:
        first.step(x_BD)
    state = first.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = new_trainer(seed=5, settings=settings)
    second.load_state_dict(state)
    for x_BD in x[10:]:
        second.step(x_BD)
    assert_same(second.state_dict(), straight.state_dict())
    assert straight.state_dict()["threshold_steps"] == 16


def test_a_loaded_trainer_shares_no_memory_with_the_one_saved():
    first = new_trainer()
    x = batches(6)
    for x_BD in x[:3]:
        first.step(x_BD)
    second = new_trainer(seed=5)
    second.load_state_dict(first.state_dict())
    kept = copy.deepcopy(second.state_dict())
    for x_BD in x[3:]:
        first.step(x_BD)
    assert_same(second.state_dict(), kept)


@pytest.mark.parametrize("settings", [SETTINGS, INIT], ids=["frozen", "init"])
def test_the_screen_changes_no_bit_of_the_state(settings):
    states = []
    for screen in ("bf16", "fp32"):
        trainer = new_trainer(settings=dataclasses.replace(settings, screen=screen))
        assert trainer.loss.screen.low == (screen == "bf16")
        for x_BD in batches(12):
            trainer.step(x_BD)
        states.append(trainer.state_dict())
    assert_same(*states)


def test_without_a_compiler_training_says_so_and_goes_on(monkeypatch):
    def missing():
        raise native.NotBuilt("no C compiler found")

    monkeypatch.setattr(native, "library", missing)
    with pytest.warns(UserWarning, match="no C compiler found"):
        trainer = new_trainer()
    assert trainer.loss.ops.name == "torch"
    trainer.step(batches(1)[0])
    with pytest.raises(native.NotBuilt):
        new_trainer(settings=dataclasses.replace(SETTINGS, kernels="compiled"))


def test_kernels_that_cannot_be_built_name_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "broken.c")
    native.SOURCE.write_text("int broken(")
    with pytest.raises(native.NotBuilt, match="error"):
        native.library.__wrapped__()
    assert list((tmp_path / "dmsae_ray").iterdir()) == [], "nothing is left behind"


def test_kernels_that_others_may_write_to_are_not_loaded(monkeypatch, tmp_path):
    """What is loaded is run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "kernels.c")
    native.SOURCE.write_text("int one(void) { return 1; }\n")
    assert native.library.__wrapped__().one() == 1
    folder = tmp_path / "dmsae_ray"
    (file,) = folder.iterdir()
    for path in (file, folder):
        mode = path.stat().st_mode
        path.chmod(0o777)
        with pytest.raises(native.NotBuilt, match=f"{path} is another user's, or everybody may write to it"):
            native.library.__wrapped__()
        path.chmod(mode)
    assert native.library.__wrapped__().one() == 1


def test_logging_changes_no_state_and_reports_the_batch():
    silent, logged = new_trainer(), new_trainer()
    for step, x_BD in enumerate(batches(8)):
        assert silent.step(x_BD) is None
        report = logged.step(x_BD, log=True)
        assert report.step == step and report.tokens == 16 * (step + 1)
    assert_same(silent.state_dict(), logged.state_dict())
    assert report.loss == pytest.approx(report.loss_rec + SETTINGS.auxk_alpha * report.loss_aux)


def test_reported_figures_by_their_definitions():
    trainer, x_BD = new_trainer(), batches(1)[0]
    report = trainer.step(x_BD, log=True)  # at learning rate 0, so the parameters are still those of the report
    p_BF = trainer.sae.pre(x_BD)
    mask_BF, _ = reference_mask(p_BF, SETTINGS.k, core_size=3)
    error_BD = trainer.sae.decode(p_BF * mask_BF) - x_BD
    assert report.fvu == pytest.approx(
        (error_BD.square().sum() / (x_BD - x_BD.mean(dim=0)).square().sum()).item(), rel=1e-5
    )
    assert report.l0 == mask_BF.sum() / 16 == 2
    assert (report.core_l0, report.free_l0) == (mask_BF[:, :3].sum() / 16, mask_BF[:, 3:].sum() / 16)
    assert (report.dead_share, report.threshold, report.loss_aux) == (0, 0, 0)


def test_dead_latents_are_reported_and_revived():
    settings = dataclasses.replace(SETTINGS, lr=0.05, decay_steps=0, warmup_steps=0, total_steps=0)
    trainer = new_trainer(core_size=0, settings=settings)
    with torch.no_grad():
        trainer.sae.b_enc[5:] = -0.3
    shares = [trainer.step(x_BD, log=True).dead_share for x_BD in batches(40)]
    assert max(shares) > 0.2 and shares[0] == 0
    assert shares[-1] < max(shares)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at_step", [0, 4])
def test_a_batch_that_is_not_finite_stops_before_any_weight_changes(value, at_step):
    trainer = new_trainer()
    x = batches(6)
    for x_BD in x[:at_step]:
        trainer.step(x_BD)
    before = copy.deepcopy(trainer.state_dict())
    bad = x[at_step].clone()
    bad[3, 2] = value
    with pytest.raises(Diverged) as raised:
        trainer.step(bad)
        trainer.settle()
    assert (raised.value.rows, raised.value.behind) == ((3,), 0)
    assert_same(trainer.state_dict(), before)
    trainer.step(x[at_step])  # a good batch still goes through, as if nothing had been
    trainer.settle()


def test_an_exploding_loss_and_a_gradient_that_is_not_finite_stop_the_run(monkeypatch):
    trainer = new_trainer()
    x = batches(3)
    trainer.step(x[0])
    trainer.settle()
    with torch.no_grad():
        trainer.sae.b_dec += 100
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(Diverged, match="step 1"):
        trainer.step(x[1])
        trainer.settle()
    assert_same(trainer.state_dict(), before)

    trainer = new_trainer()
    trainer.step(x[0])
    before, compute = copy.deepcopy(trainer.state_dict()), trainer.loss.compute

    def overflowing(*arguments, **named):
        loss, gradient, outcome = compute(*arguments, **named)
        gradient[5] = math.inf
        return loss, gradient, outcome

    monkeypatch.setattr(trainer.loss, "compute", overflowing)
    with pytest.raises(Diverged, match="gradient") as raised:
        trainer.step(x[1])
        trainer.settle()
    assert raised.value.rows == ()
    assert_same(trainer.state_dict(), before)


def test_wrong_batches_settings_and_states_are_refused():
    trainer = new_trainer()
    with pytest.raises(ValueError, match="shape"):
        trainer.step(torch.zeros(15, 6))
    with pytest.raises(ValueError, match="float16"):
        trainer.step(torch.zeros(16, 6, dtype=torch.float16))
    with pytest.raises(ValueError, match="24 x 6"):
        Trainer(trainer.sae, dataclasses.replace(SETTINGS, width=32))
    with pytest.raises(ValueError, match="another configuration"):
        new_trainer(core_size=4).load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match="another configuration"):
        new_trainer(settings=INIT).load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match="version"):
        trainer.load_state_dict({**trainer.state_dict(), "version": 0})

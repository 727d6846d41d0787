import pytest

from dmsae_ray.sae.settings import SAESettings, group_sizes, schedule


def test_group_sizes_give_the_rest_to_the_last_group():
    assert group_sizes(65_536, (1 / 32, 1 / 16, 1 / 8, 1 / 4)) == [2048, 4096, 8192, 16384, 34816]
    assert group_sizes(1999, (1 / 32, 1 / 16, 1 / 8, 1 / 4)) == [62, 124, 249, 499, 1065]
    assert sum(group_sizes(5, (0.1, 0.7))) == 5


def test_schedule_of_the_published_run_and_of_a_short_one():
    long = schedule(total_steps=244_140, batch=2048)
    assert long == {
        "total_steps": 244_140,
        "warmup_steps": 1000,
        "decay_steps": 48_828,
        "dead_window_tokens": 10_000_000,
        "threshold_start_step": 1000,
    }
    short = schedule(total_steps=320, batch=1024)
    assert short == {
        "total_steps": 320,
        "warmup_steps": 16,
        "decay_steps": 64,
        "dead_window_tokens": 32_768,
        "threshold_start_step": 16,
    }
    SAESettings(d=4, width=8, k=1, batch=1, **schedule(total_steps=1, batch=1))


def test_learning_rate_warms_up_from_zero_and_decays_to_one_step_above_zero():
    settings = SAESettings(d=4, width=8, k=1, batch=1, lr=1.0, warmup_steps=4, decay_steps=5, total_steps=20)
    assert [settings.learning_rate(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [settings.learning_rate(step) for step in range(14, 22)] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 0),
        ("k", 9),
        ("core_gate", "topk"),
        ("prefix_fractions", (0.5, 0.6)),
        ("prefix_fractions", ()),
        ("lr", 0.0),
        ("decay_steps", 7),
        ("auxk_k", 0),
        ("threshold_beta", 1.0),
        ("core_decoder_init", "zero"),
        ("decoder", "frozen_random"),
        ("l2", -1e-3),
        ("core_budget", "free"),
        ("core_transfer", "thaw"),
        ("parallel", "pipeline"),
        ("micro_batch", 0),
    ],
)
def test_a_senseless_setting_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        SAESettings(**{"d": 4, "width": 8, "k": 1, "batch": 1, field: value})

"""What drives chains, apart from driving them."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

from ray.tune.execution import class_cache

from dmsae_ray.attribution.aggregator import Aggregator
from dmsae_ray.distill import trials


def test_a_trial_imports_no_torch():
    """Nor does what Ray imports for it; the import law looks at our own modules alone."""
    code = "import sys, ray.tune, dmsae_ray.distill.trials; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Trial:
    def __init__(self, number: int):
        self.trial_id, self.config = str(number), {"group": number}


def test_groups_begin_as_room_for_them_comes_and_share_aggregators(monkeypatch):
    """As many aggregators as the groups at work need, and none has more than its share."""
    made = []
    monkeypatch.setattr(Aggregator, "remote", lambda: made.append(len(made)) or made[-1])
    now, room = [0.0], [1]
    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
    starts = trials.Starts(lambda: room[0])
    starts._trial_generator = map(Trial, range(40))  # what Tune makes of the grid

    def begun() -> list[Trial]:
        now[0] += trials.LOOK_S
        found = []
        while (trial := starts.next_trial()) is not None:
            found.append(trial)
        return found

    first = begun()
    assert [trial.config for trial in first] == [{"group": 0, "aggregator": 0}] and not begun() and made == [0]
    room[0] = 10
    at_work = first + begun()
    assert [trial.config["group"] for trial in at_work] == list(range(10)) and made == [0, 1]
    assert [trial.config["aggregator"] for trial in at_work] == [0] * 8 + [1] * 2
    room[0] = 5  # nodes left: none begins before so few are at work
    for trial in at_work[:5]:
        starts.on_trial_complete(trial.trial_id)
        assert not begun()
    starts.on_trial_complete(at_work[5].trial_id)
    (next_one,) = begun()
    assert next_one.config == {"group": 10, "aggregator": 0} and made == [0, 1]


def test_a_head_that_does_not_answer_ends_nothing_that_is_at_work(monkeypatch, caplog):
    answers = iter([lambda: 2, lambda: 1 / 0, lambda: 3])
    monkeypatch.setattr(Aggregator, "remote", lambda: 0)
    monkeypatch.setattr(trials, "LOOK_S", 0.0)
    starts = trials.Starts(lambda: next(answers)())
    starts._trial_generator = map(Trial, range(9))
    starts.next_trial()
    assert starts.max_concurrent == 2
    starts.next_trial()
    assert starts.max_concurrent == 2 and "how many chains fit now is not known" in caplog.text
    starts.next_trial()
    assert starts.max_concurrent == 3


def test_between_two_looks_at_the_cluster_it_is_let_alone(monkeypatch):
    asked = []
    starts = trials.Starts(lambda: asked.append(1) or 1)
    monkeypatch.setattr(Aggregator, "remote", lambda: 0)
    starts._trial_generator = map(Trial, range(3))
    assert starts.next_trial() is not None
    assert all(starts.next_trial() is None for _ in range(50)) and len(asked) == 1
    copy = pickle.loads(pickle.dumps(starts))  # Tune keeps one, in a file
    assert not hasattr(copy, "_concurrent")


def test_keys_of_a_bucket_are_in_no_trial_s_runtime_environment(monkeypatch):
    """Ray's dashboard shows it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    before = set(class_cache.ENV_VARS_TO_PROPAGATE)
    try:
        trials.hand_on_no_keys()
        made = class_cache._ActorClassCache().get(type("Trial", (), {}))
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE.update(before)
    assert "PL_DISABLE_FORK" in str(made._default_options) and "hunter2" not in str(made._default_options)


def test_retries_are_told_from_none_on(monkeypatch):
    told: list = []
    monkeypatch.setattr(trials, "tell_retries", lambda *what: told.append(what))
    chains = [SimpleNamespace(config=SimpleNamespace(name="mine"), label=f"seed{seed}-k8") for seed in (0, 1)]
    retries = trials.Retries(chains)
    retries.after_exception(run_context=None, worker_exceptions={0: ValueError()})  # as Ray Train calls it
    labels = ["seed0-k8", "seed1-k8"]
    assert told == [("mine", labels, 0), ("mine", labels, 1)]

"""What waits for room on a cluster says so, once a minute has passed."""

from dmsae_ray.cluster.waiting import AGAIN_S, PATIENCE_S, Waits, names, shape_of
from dmsae_ray.config import Config

WORKER = shape_of({"CPU": 0.5})


def watch():
    said, now_wanted = [], {}
    state = "The cluster has 2 CPUs, 0.4 free; 3 other drivers at work"
    return Waits(Config(), said.append, lambda: now_wanted, lambda: state), said, now_wanted


def test_a_minute_of_waiting_is_told_with_what_would_end_it():
    waits, said, wanted = watch()
    wanted[WORKER] = 2
    waits.look(100.0)
    waits.look(99.0 + PATIENCE_S)
    assert not said
    waits.look(101.0 + PATIENCE_S)
    (line,) = said
    assert line.startswith("waiting for 61 s: a training worker asks for 0.5 CPUs on one node") and "(2 wait)" in line
    assert "0.4 free; 3 other drivers" in line and "another node comes (ray start" in line
    waits.look(110.0 + PATIENCE_S)
    assert len(said) == 1
    waits.look(102.0 + PATIENCE_S + AGAIN_S)
    assert len(said) == 2


def test_who_got_room_in_between_begins_to_wait_anew():
    waits, said, wanted = watch()
    wanted[WORKER] = 1
    waits.look(0.0)
    wanted.clear()
    waits.look(30.0)
    wanted[WORKER] = 1
    waits.look(40.0)
    waits.look(PATIENCE_S + 10.0)
    assert not said


def test_what_others_alone_ask_for_is_theirs_to_tell():
    waits, said, wanted = watch()
    wanted[shape_of({"CPU": 7})] = 1
    waits.look(0.0)
    waits.look(2 * PATIENCE_S)
    assert not said


def test_everything_that_is_asked_for_has_a_name():
    known = names(Config(cluster={"gpus_per_worker": 2}, harvest={"gpus_per_actor": 0.25}))
    for shape in ({"CPU": 0.5, "GPU": 2}, {"CPU": 1, "GPU": 0.25}, {"CPU": 0.01}):
        assert shape_of(shape | {"node:10.0.0.1": 0.0001, "memory": 0}) in known
    same = names(Config(cluster={"cpus_per_worker": 1}))[shape_of({"CPU": 1.0})]
    assert "training worker" in same and "language model" in same


def test_a_cluster_that_does_not_answer_ends_the_watch_with_a_word(monkeypatch):
    monkeypatch.setattr("dmsae_ray.cluster.waiting.LOOK_S", 0.01)
    said = []

    def gone():
        raise ConnectionError("no such head")

    waits = Waits(Config(), said.append, gone).start()
    waits._thread.join(5)
    assert said == ["warning: the cluster does not say what waits on it (ConnectionError: no such head)"]
    waits.stop()

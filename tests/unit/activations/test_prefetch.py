"""Items made in a thread ahead of their use: as many as were asked for and no more, in order, errors in their place."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from dmsae_ray.activations.prefetch import Ahead


@pytest.fixture(autouse=True)
def nothing_old_is_looked_at():
    """Twenty collections that go through all that the test process has imported take seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


class Item:
    """Something that can be seen to go."""

    def __init__(self, number):
        self.number = number


class Source:
    """Counts what was made and whether its generator was closed."""

    def __init__(self, items, error_at=None):
        self.items, self.error_at, self.made, self.closed, self.thread = items, error_at, 0, threading.Event(), None

    def __call__(self):
        self.thread = threading.current_thread()
        try:
            for number in range(self.items):
                if number == self.error_at:
                    raise OSError(f"item {number}")
                self.made += 1
                yield Item(number)
        finally:
            self.closed.set()


def settle(condition):
    """Wait until something holds that another thread brings about."""
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 50])
def test_items_come_in_order_and_end(items, depth):
    source = Source(items)
    assert [item.number for item in Ahead(source, depth)] == list(range(items))
    assert settle(lambda: not source.thread.is_alive()) and source.closed.is_set()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_starts_at_once_and_makes_no_more_than_it_may(depth):
    source = Source(50)
    ahead = Ahead(source, depth)
    assert settle(lambda: source.made == depth + 1)
    time.sleep(0.3)  # three times as long as a put waits: it would have gone on
    assert source.made == depth + 1, "those that wait, and one in hand"
    taken = iter(ahead)
    for number in range(4):
        assert next(taken).number == number
        assert settle(lambda: source.made == number + depth + 2)
    ahead.close()


def test_an_error_arrives_in_its_place():
    taken = iter(Ahead(Source(50, error_at=3), depth=2))
    assert [next(taken).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="item 3"):
        next(taken)


def test_an_error_before_the_first_item_arrives_too():
    def make():
        raise LookupError("no source")

    with pytest.raises(LookupError, match="no source"):
        next(iter(Ahead(make, depth=1)))


def test_what_is_no_generator_is_taken_as_well():
    assert list(Ahead(lambda: [1, 2, 3], depth=1)) == [1, 2, 3]


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_close_ends_the_thread_and_the_source(taken):
    source = Source(10**9)
    generator = source()  # named here too: it is closed, and not only forgotten
    ahead = Ahead(lambda: generator, depth=2)
    items = iter(ahead)
    for _ in range(taken):
        next(items)
    assert settle(lambda: source.made > taken)
    ahead.close()
    assert source.closed.is_set() and not source.thread.is_alive() and source.made <= taken + 4
    ahead.close()


def test_an_item_is_let_go_when_the_next_is_taken():
    """A block is shared memory: it is there as long as anything names it, on either side."""
    seen = []

    def make():
        for number in range(20):
            item = Item(number)
            seen.append(weakref.ref(item))
            yield item
            del item

    def alive():
        return [number for number, item in enumerate(seen) if item() is not None]

    ahead = Ahead(make, depth=2)
    for item in ahead:
        number = item.number
        assert settle(lambda: len(seen) == min(20, number + 4))
        gc.collect()
        assert alive() == list(range(number, min(20, number + 4))), "the one in use, two that wait, one in hand"
        del item
    assert settle(lambda: alive() == [])


def test_an_item_is_let_go_while_the_next_one_is_being_made():
    seen, go_on = [], threading.Event()

    def make():
        item = Item(0)
        seen.append(weakref.ref(item))
        yield item
        del item
        go_on.wait()
        yield Item(1)

    ahead = Ahead(make, depth=1)
    taken = iter(ahead)
    assert next(taken) is seen[0]()
    taken.close()
    gc.collect()
    try:
        assert settle(lambda: seen[0]() is None), "the making side names it no more"
    finally:
        go_on.set()
        ahead.close()


def test_close_lets_go_of_what_was_made_ahead():
    seen = []

    def make():
        while True:
            item = Item(len(seen))
            seen.append(weakref.ref(item))
            yield item
            del item

    ahead = Ahead(make, depth=3)
    assert settle(lambda: len(seen) == 4)
    ahead.close()
    gc.collect()
    assert [item() for item in seen if item() is not None] == []

"""Which labels a selector takes: as Ray does."""

import pytest
from ray._private.label_utils import validate_label_selector

from dmsae_ray.config import Config
from dmsae_ray.labels import selected

NODES = {"spot": {"market": "spot", "zone": "a"}, "reserved": {"market": "reserved"}, "bare": {}}


@pytest.mark.parametrize(
    "selector, nodes",
    [
        ({}, "spot reserved bare"),
        ({"market": "spot"}, "spot"),
        ({"market": "!spot"}, "reserved bare"),
        ({"market": "in(spot, reserved)"}, "spot reserved"),
        ({"market": "in(spot,other)", "zone": "a"}, "spot"),
        ({"market": "!in(spot, other)"}, "reserved bare"),
        ({"market": "spot", "zone": "b"}, ""),
    ],
)
def test_a_selector_takes_the_nodes_that_hold_all_of_it(selector, nodes):
    assert validate_label_selector(selector) is None
    selector = Config(cluster={"label_selector": selector}).cluster.label_selector
    assert " " not in "".join(selector.values())
    assert [name for name, labels in NODES.items() if selected(selector, labels)] == nodes.split()


@pytest.mark.parametrize(
    "key, value", [("-x", "a"), ("x", "a b"), ("x", "in()"), ("x", "!!a"), ("a/b/c", "d"), ("", "a")]
)
def test_what_ray_would_refuse_is_known_from_the_configuration(key, value):
    assert validate_label_selector({key: value}) is not None
    with pytest.raises(ValueError, match=r"cluster\.label_selector: "):
        Config(cluster={"label_selector": {key: value}})

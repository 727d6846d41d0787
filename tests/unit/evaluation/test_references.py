"""What a cycle will take, told from the references' time."""

from dmsae_ray.config import Config
from dmsae_ray.evaluation.references import cycle_seconds


def test_a_cycle_takes_what_its_passes_of_the_model_take():
    config = Config(evaluate={"tokens": 1000}, attribution={"tokens": 500}, sae={"prefix_fractions": [0.1, 0.2]})
    # 3 references of 1000 tokens in 30 s: 10 ms a token. Four prefixes (core, two groups, all); scores: three passes.
    assert cycle_seconds(config, {"seconds": 30.0, "tokens": 1000, "clean": 1.0}) == (40.0, 15.0)
    assert cycle_seconds(config, {"tokens": 1000, "clean": 1.0}) is None, "references of before know no time"

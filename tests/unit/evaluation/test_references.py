"""What a cycle and the features will take, told from the references' time."""

from dmsae_ray.config import Config
from dmsae_ray.evaluation.references import cycle_seconds, features_seconds


def test_a_cycle_takes_what_its_passes_of_the_model_take():
    config = Config(evaluate={"tokens": 1000}, attribution={"tokens": 500}, sae={"prefix_fractions": [0.1, 0.2]})
    # 3 references of 1000 tokens in 30 s: 10 ms a token. Four prefixes (core, two groups, all); scores: three passes.
    assert cycle_seconds(config, {"seconds": 30.0, "tokens": 1000, "clean": 1.0}) == (40.0, 15.0)
    assert cycle_seconds(config, {"tokens": 1000, "clean": 1.0}) is None, "references of before know no time"


def test_features_take_the_text_once_and_each_of_their_contexts_again():
    settings = {"tokens": 1000, "most": 5, "contexts": 4}
    config = Config(features=settings, model={"context": 50})
    known = {"seconds": 30.0, "tokens": 1000}
    assert features_seconds(config, known, 3) == 10.0 + 3 * 4 * 0.5
    assert features_seconds(config, known, 300) == 10.0 + 5 * 4 * 0.5, "no more than features.most"
    config = Config(features=settings | {"effects": 0}, model={"context": 50})
    assert features_seconds(config, known, 3) == 10.0, "nothing is removed"
    assert features_seconds(config, {"tokens": 1000}, 3) is None

"""A configuration's fields, as the parts of training and attribution take them.

A field goes where a field of the same name waits for it; only what bears another name, or is worked out, is written
down here. A test sees that no field of the configuration is left over.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel

from dmsae_ray.activations.dataset import Manifest
from dmsae_ray.activations.stream import StreamLimits
from dmsae_ray.attribution.gradients import AttributionSettings
from dmsae_ray.attribution.scores import ScoreSettings
from dmsae_ray.config import Config
from dmsae_ray.sae.settings import SAESettings, schedule

T = TypeVar("T")


def steps_of(config: Config) -> int:
    """Training steps of a cycle; rows beyond the last whole batch are dropped."""
    return config.train.tokens // config.train.batch


def sae_settings(config: Config, k: int, d: int) -> SAESettings:
    """Of an SAE of this k for vectors of length d, and of its training."""
    train = config.train
    lengths = schedule(
        steps_of(config),
        train.batch,
        warmup_steps=train.warmup_steps,
        warmup_share=train.warmup_share,
        dead_window_tokens=train.dead_window_tokens,
        dead_window_share=train.dead_window_share,
        decay_share=train.decay_share,
    )
    beta1, beta2 = train.betas
    return _by_name(SAESettings, config.sae, train, d=d, k=k, beta1=beta1, beta2=beta2, **lengths)


def attribution_settings(config: Config, manifest: Manifest) -> AttributionSettings:
    """How rows of this dataset are attributed: those within its bound on norms and, where attribution.outlier_norm is
    set, within that multiple of its median norm.
    """
    multiple = config.attribution.outlier_norm
    own = () if multiple is None else (multiple * manifest.norm_quantiles["0.5"],)
    bounds = own if manifest.max_norm is None else (*own, manifest.max_norm)
    return _by_name(AttributionSettings, config.attribution, max_norm=min(bounds, default=None))


def score_settings(config: Config) -> ScoreSettings:
    """What decides scores and core."""
    return _by_name(ScoreSettings, config.attribution)


def stream_limits(config: Config) -> StreamLimits:
    """What a worker's stream of rows may use."""
    return _by_name(StreamLimits, config.cluster)


def _by_name(target: type[T], *sections: BaseModel, **more: Any) -> T:
    """The dataclass made of these sections' fields of the same names; `more` comes first."""
    given = {
        field.name: getattr(section, field.name)
        for section in sections
        for field in fields(target)  # type: ignore[arg-type]  # a dataclass, which no annotation can say
        if field.name in type(section).model_fields
    }
    return target(**given | more)

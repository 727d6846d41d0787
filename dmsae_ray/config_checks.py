"""What of a configuration can be known to be wrong without a model or a cluster.

Every problem names fields and remedy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from dmsae_ray.labels import selector_problem
from dmsae_ray.secret_url import scrub

if TYPE_CHECKING:
    from dmsae_ray.config import Config

NUMBERS = ("chains", "evaluation", "consistency", "consensus", "rediscovery")
"""First parts of the names of results, see results/numbers.py."""


def problems_of(config: Config) -> list[str]:
    """What is wrong between the fields of different sections, and in the study's arms."""
    checks = (_sae, _batches, _workers, _rows, _parts, _choices, _arms, _expected_of_nothing)
    return [problem for check in checks for problem in check(config)]


def _sae(config: Config) -> Iterator[str]:
    sae, batch = config.sae, config.train.batch
    if int(sae.prefix_fractions[0] * sae.width) < 1:
        yield (
            f"sae.width {sae.width} x sae.prefix_fractions[0] {sae.prefix_fractions[0]:g} leaves the first group "
            "without a latent: widen the SAE or raise the fraction"
        )
    if sae.decoder == "frozen_random" and sae.core_decoder_init == "encoder":
        yield (
            "sae.decoder frozen_random with sae.core_decoder_init encoder: a core's decoder rows would be trained "
            "encoder rows; set sae.core_decoder_init to kept (a member keeps its random row) or random"
        )
    if sae.core_decoder_init == "kept" and sae.core_transfer == "random":
        yield (
            "sae.core_decoder_init kept with sae.core_transfer random: random encoder rows have no decoder rows to "
            "keep; use encoder or random"
        )
    for k in config.sweep.k:
        if not 1 <= k <= sae.width:
            yield (
                f"sweep.k {k}: a batch of {batch} tokens can give at most {batch * sae.width} active pairs "
                f"(train.batch x sae.width), k x batch must not exceed that: use k between 1 and {sae.width}"
            )


def _batches(config: Config) -> Iterator[str]:
    train, per_group = config.train, config.harvest.rows_per_group
    if train.batch % train.lanes:
        yield f"train.batch {train.batch} is not a multiple of train.lanes {train.lanes}"
    elif per_group % (train.batch // train.lanes):
        yield (
            f"harvest.rows_per_group {per_group} is not a multiple of train.batch / train.lanes "
            f"= {train.batch // train.lanes}"
        )


def _workers(config: Config) -> Iterator[str]:
    cluster, lanes = config.cluster, config.train.lanes
    for field, gpus in (
        ("cluster.gpus_per_worker", cluster.gpus_per_worker),
        ("harvest.gpus_per_actor", config.harvest.gpus_per_actor),
    ):
        if gpus > 1 and gpus % 1:
            yield f"{field} {gpus:g}: Ray gives out whole GPUs, or a part of one: use {int(gpus)} or {int(gpus) + 1}"
    if cluster.workers > 1 and 0 < cluster.gpus_per_worker < 1:
        yield (
            f"cluster.workers {cluster.workers} with cluster.gpus_per_worker {cluster.gpus_per_worker:g}: two workers "
            "of a chain would share a GPU, which NCCL refuses; use 1 GPU per worker, or 1 worker (several chains may "
            "share a GPU)"
        )
    if (wrong := selector_problem(cluster.label_selector)) is not None:
        yield f"cluster.label_selector: {wrong}"
    if cluster.fewest_workers > cluster.workers or lanes % cluster.fewest_workers:
        yield (
            f"cluster.min_workers {cluster.fewest_workers}: at most cluster.workers {cluster.workers}, and train.lanes "
            f"{lanes} a multiple of it"
        )
    if lanes % cluster.workers:
        yield f"train.lanes {lanes} is not a multiple of cluster.workers {cluster.workers}"


def _rows(config: Config) -> Iterator[str]:
    harvest, train = config.harvest, config.train
    if harvest.rows_per_shard % harvest.rows_per_group:
        yield (
            f"harvest.rows_per_shard {harvest.rows_per_shard} is not a multiple of harvest.rows_per_group "
            f"{harvest.rows_per_group}"
        )
    if harvest.tokens < harvest.rows_per_group * train.lanes:
        yield (
            f"harvest.tokens {harvest.tokens} is less than one row group for each lane (harvest.rows_per_group x "
            f"train.lanes = {harvest.rows_per_group * train.lanes})"
        )
    if train.tokens < train.batch:
        yield f"train.tokens {train.tokens} is less than one batch (train.batch {train.batch})"


def _parts(config: Config) -> Iterator[str]:
    harvest, seeds, parts = config.harvest, config.sweep.seeds, config.sweep.n_parts
    if config.sweep.data == "disjoint":
        if parts == 1:
            yield f"sweep.data disjoint with one seed, {seeds[0]}: set sweep.parts, of which it takes one"
        if len({seed % parts for seed in seeds}) < len(seeds):
            enough = next(n for n in itertools.count(parts) if len({seed % n for seed in seeds}) == len(seeds))
            yield (
                f"sweep.seeds {list(seeds)}: with sweep.data disjoint two of them would take the same of {parts} parts "
                f"(seed modulo sweep.parts); set sweep.parts to {enough}"
            )
    if parts > 1 and harvest.tokens // parts < harvest.rows_per_group * config.train.lanes:
        yield (
            f"sweep.parts {parts}: of harvest.tokens {harvest.tokens} each part has {harvest.tokens // parts}, less "
            f"than one row group for each lane (harvest.rows_per_group x train.lanes = "
            f"{harvest.rows_per_group * config.train.lanes}); raise harvest.tokens, or lower harvest.rows_per_group"
        )


def _choices(config: Config) -> Iterator[str]:
    harvest, attribution, corpus, selection = config.harvest, config.attribution, config.corpus, config.selection
    if selection.by == "attribution" and selection.size == "match" and config.sae.core_transfer != "random":
        yield (
            "selection.size match takes the sizes of the chain that selects by attribution, and would be that chain "
            "once more: set selection.by, or sae.core_transfer to random, or leave selection.size at tau"
        )
    if config.selection.by == "reconstruction" and attribution.candidates == "all":
        yield (
            "selection.by reconstruction measures the latents of core and first group only: set attribution.candidates "
            "to first_group"
        )
    own, bound = attribution.outlier_norm, harvest.outlier_norm
    if own is not None and bound is not None and own >= bound:
        yield (
            f"attribution.outlier_norm {own:g} has nothing to do: harvest.outlier_norm {bound:g} leaves out as much "
            "for training and attribution alike; lower it or leave it empty"
        )
    if harvest.dataset is not None and (harvest.hooks or harvest.store):
        yield (
            "harvest.dataset names a finished dataset, so harvest.hooks and harvest.store have nothing to do: leave "
            "them empty"
        )
    if corpus.attribution_share + corpus.evaluation_share >= 1:
        yield "corpus.attribution_share + corpus.evaluation_share leave no text to train on"


def _arms(config: Config) -> Iterator[str]:
    if config.study.arms and config.sae.core is not None:
        yield (
            "sae.core and study.arms are both given: arms are compared with chains that began without a core; leave "
            "one empty"
        )
    for name, arm in config.study.arms.items():
        if arm.fields.get("sweep.data") == "disjoint" and config.sweep.n_parts == 1:
            yield (
                f"study.arms.{name}: sweep.data disjoint: documents are dealt to parts when they are harvested, for "
                f"all arms: set sweep.parts to {max(2, len(arm.seeds or config.sweep.seeds))}"
            )
            continue
        try:
            config.of_arm(name)
        except ValidationError as error:
            yield from (f"study.arms.{name}: {line}" for line in problem_lines(error))


def _expected_of_nothing(config: Config) -> Iterator[str]:
    """Expectations whose names cannot be those of a result: known now, not after hours of work."""
    arms = {"base", *config.study.arms}
    for expected in config.study.expect:
        for name in (expected.value, expected.above, expected.below):
            if not isinstance(name, str):
                continue
            kind, arm, *_ = [*name.split("."), ""]
            if kind not in NUMBERS:
                yield f"study.expect {name!r}: results begin with {', '.join(NUMBERS)}"
            elif kind != "consensus" and not arms.issuperset(arm.split("~")):
                yield f"study.expect {name!r}: no arm {arm!r}; there are {', '.join(sorted(arms))}"


def problem_lines(error: ValidationError) -> list[str]:
    """One line per mistake: the field, what is wrong, what would be right."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "configuration"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: no such field (see --help for all fields)")
        elif problem["type"] == "value_error":
            lines += [f"{where}: {part}" for part in str(problem["ctx"]["error"]).splitlines()]
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})")
    return [scrub(line) for line in lines]

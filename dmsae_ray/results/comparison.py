"""Comparing finished chains: from their folders to `comparison.json`.

A pair is computed once for its two cores and settings and kept in `pairs/<key>.json` of the output folder: a chain more
asks for its own pairs only, and what was computed before a sweep was stopped is not lost.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.compare.chain_result import ChainIdentity, ChainResult
from dmsae_ray.compare.comparer import Comparer, Side
from dmsae_ray.compare.course import ROWS as COURSE_ROWS
from dmsae_ray.compare.course import CycleCore
from dmsae_ray.compare.measured_latents import MeasuredLatents
from dmsae_ray.compare.pair import CompareSettings, PairResult
from dmsae_ray.compare.pairing import Pairing, pairs_across, pairs_within, sample
from dmsae_ray.compare.summary import summarise
from dmsae_ray.config import CompareConfig, Config
from dmsae_ray.core.core import Core
from dmsae_ray.core.score_file import load_scores
from dmsae_ray.core.select import rank
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.evaluation.loss_gradients import gradients_path, read_gradients
from dmsae_ray.files import file_sha256, present, write_json
from dmsae_ray.identity import fields_key
from dmsae_ray.results.parts import UNREADABLE, damaged, known_from
from dmsae_ray.results.plain_pairs import with_matched_compute
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.show.terminal.progress import duration

FORMAT_VERSION = 3
"""Raised when a pair of the same cores would give other numbers or fields: what was compared before is then compared
again.
"""
SUMMARY_VERSION = 1
"""Raised when the same pairs would be summed up in another way; the pairs themselves are kept."""
KEPT_BYTES = 4 << 30
"""Chains up to this size together stay in memory between their pairs; two always do."""
QUIET_S = 30.0
"""Longest time in which nothing is said of how far it is."""
LATENTS_ENCODED = 8
"""Latents whose activations are kept of a chain, for each member of its core: core, cycle-0 set, and the free latents
of twenty draws.
"""


class DamagedChain(ValueError):
    """A finished chain's files cannot be read. The message names them and the remedy."""

    def __init__(self, label: str, folder: Path, error: BaseException):
        super().__init__(damaged(folder, error))
        self.label = label


def compare_chains(
    config: Config, dataset: ActivationDataset, plans: Sequence[ChainPlan], folder: Path, say: Callable[[str], None]
) -> dict:
    """The finished ones of these chains, every pair that `pairing.pairs_within` names or a sample of them, each score
    beside its nulls.

    Written to `folder`, and reused while the cores are the same. A finished chain whose files cannot be read is left
    out, and stands among the failed ones with the reason. Raises ValueError if two chains have everything in common.
    """
    chains = {plan.label: plan for plan in plans if plan.finished()}
    failed = [{"label": p.label, "reason": unfinished(p)} for p in plans if not p.finished()]
    while True:
        pairs = pairs_within([identity(plan) for plan in chains.values()])
        try:
            return _comparison(config, dataset, chains, pairs, folder / "comparison.json", say, failed)
        except DamagedChain as error:  # the others are compared without it
            del chains[error.label]
            failed.append({"label": error.label, "reason": str(error)})


def compare_across(
    config: Config,
    dataset: ActivationDataset,
    left: Sequence[ChainPlan],
    right: Sequence[ChainPlan],
    names: tuple[str, str],
    path: Path,
    say: Callable[[str], None],
) -> dict:
    """Two sweeps, as `compare_chains` compares one: pairs between them of one arm and k, of equal and of different
    seeds.

    names: of the sweeps, which come before their chains' labels (`first:seed0-k16`). dataset: whose held-out rows
    activations are compared on, each chain dividing them by its own scale. A chain that is in both is not compared with
    itself; with no pair left the summary says so. Written to `path`. Raises ValueError if the two names are one.
    """
    if names[0] == names[1]:
        raise ValueError(f"both sweeps are called {names[0]}: give each a name of its own")
    sides = [
        {f"{name}:{plan.label}": plan for plan in plans if plan.finished()}
        for name, plans in zip(names, (left, right), strict=True)
    ]
    pairs = pairs_across(*([identity(plan, label) for label, plan in side.items()] for side in sides))
    failed = [
        {"label": f"{name}:{plan.label}", "reason": unfinished(plan)}
        for name, plans in zip(names, (left, right), strict=True)
        for plan in plans
        if not plan.finished()
    ]
    return _comparison(config, dataset, sides[0] | sides[1], pairs, path, say, failed)


def _comparison(
    whole: Config,
    dataset: ActivationDataset,
    chains: dict[str, ChainPlan],
    pairs: list[Pairing],
    path: Path,
    say: Callable[[str], None],
    failed: list[dict],
) -> dict:
    config, keys = whole.compare, {}
    measured = gradients_path(whole.home / "data" / dataset.manifest.key, whole)
    gradients = measured if measured.exists() else None
    for label, plan in chains.items():
        try:
            keys[label] = key_of(plan)
        except OSError as error:
            raise DamagedChain(label, plan.folder.path, error) from error
    key = fields_key(
        {
            "format": [FORMAT_VERSION, SUMMARY_VERSION],
            "settings": config.model_dump(mode="json"),
            "rows": dataset.manifest.key,
            "gradients": _stamp(gradients),
            "chains": keys,
            "arms": {label: plan.arm for label, plan in chains.items()},
            "failed": failed,
        }
    )
    if (known := known_from(path, say)) and known.get("key") == key:
        return known
    of = Counter(pair.group for pair in pairs)
    if config.pairs == "sample":
        assert config.sample is not None, "the configuration asks for both or none"
        pairs = sample(pairs, config.sample, config.seed)
    sides = _Sides(config, dataset, gradients, chains)
    results, seconds = _results(sides, keys, pairs, whole.home / "pairs", say)
    results = with_matched_compute(results, chains, lambda label: sides.load(label), config.cosine)
    comparison = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "chains": list(chains),
        "arms": {label: plan.arm for label, plan in chains.items()},
        "failed": failed,
        "sample": config.sample,
        "pairs": [result.to_dict() for result in results],
        "summary": summarise(results, of).to_dict(),
        "seconds_per_pair": sum(seconds) / len(seconds) if seconds else None,
    }
    write_json(path, comparison)
    return comparison


@dataclass(frozen=True)
class _Sides:
    """The chains, ready for their pairs; rows and chains are read when the first pair asks."""

    config: CompareConfig
    dataset: ActivationDataset
    gradients: Path | None
    """the clean model's, on evaluation tokens; None: loss effects are not compared"""
    chains: dict[str, ChainPlan]

    @cached_property
    def comparer(self) -> Comparer:
        loss_rows = None if self.gradients is None else read_gradients(self.gradients)
        return Comparer(self.dataset.calibration_rows(), settings_of(self.config), loss_rows=loss_rows)

    @cached_property
    def load(self) -> Callable[[str], Side]:
        """A chain by its label, kept in memory as long as there is room."""
        loss_rows = self.comparer.loss_rows
        effect_rows = 0 if loss_rows is None else len(loss_rows.x_MD)
        room = _kept_chains(list(self.chains.values()), len(self.comparer.rows_RD), effect_rows)
        return lru_cache(maxsize=room)(lambda label: self.comparer.side(_read(self.chains[label], label)))


def _results(
    sides: _Sides, keys: dict[str, str], pairs: list[Pairing], kept: Path, say: Callable[[str], None]
) -> tuple[list[PairResult], list[float]]:
    """The pairs' results and the seconds that each took, when it was computed."""
    settings, rows, stamp = settings_of(sides.config), sides.dataset.manifest.key, _stamp(sides.gradients)
    files = {
        pair: kept / f"{_pair_key(settings, rows, stamp, keys[pair.a.label], keys[pair.b.label])}.json"
        for pair in pairs
    }
    known = {pair: found for pair, file in files.items() if (found := known_from(file, say)) is not None}
    missing = [pair for pair in pairs if pair not in known]
    if missing:
        again = f", {len(pairs) - len(missing)} more are known" if len(missing) < len(pairs) else ""
        say(f"compare: {len(missing)} pairs of cores, {settings.draws} draws of each null{again}")
        kept.mkdir(parents=True, exist_ok=True)
        # Without a pair the rows are not asked for: what failed the chains may be that they cannot be read.
        comparer, load = sides.comparer, sides.load
        said = start = time.perf_counter()
        for done, pair in enumerate(missing, 1):
            began = time.perf_counter()
            result = comparer.pair(load(pair.a.label), load(pair.b.label))
            now = time.perf_counter()
            write_json(files[pair], {"seconds": now - began, "pair": result.to_dict()})
            known[pair] = json.loads(files[pair].read_text())
            if now - said > QUIET_S and done < len(missing):
                say(
                    f"compare: {done} of {len(missing)} pairs, "
                    f"{duration((now - start) / done * (len(missing) - done))} left"
                )
                said = now
    # What is known may have been computed under other labels.
    return [PairResult.from_dict(known[pair]["pair"]).of(pair) for pair in pairs], [
        known[pair]["seconds"] for pair in pairs
    ]


def settings_of(config: CompareConfig) -> CompareSettings:
    return CompareSettings(draws=config.draws, cosine=config.cosine, max_latents=config.max_latents, seed=config.seed)


def _stamp(gradients: Path | None) -> str | None:
    """Stands for the rows that effects on the loss are compared on; the dataset, named beside it, decides the rest."""
    return None if gradients is None else gradients.name


def _pair_key(settings: CompareSettings, rows: str, gradients: str | None, a: str, b: str) -> str:
    return fields_key(
        {
            "format": FORMAT_VERSION,
            "settings": vars(settings),
            "rows": rows,
            "gradients": gradients,
            "a": a,
            "b": b,
        }
    )


def pair_names(config: CompareConfig, data: Path, chains: list[tuple[ChainFolder, int]]) -> set[str]:
    """Names of the files in `pairs` that a comparison of these chains, (folder, cycles) each, may ask for. data: the
    dataset's folder in the output folder, named by its key.
    """
    settings = settings_of(config)
    keys = [key_of_folder(folder, cycles) for folder, cycles in chains if len(folder.records()) >= cycles]
    measured: list[str | None] = [path.name for path in data.glob("loss-gradients-*.safetensors")]
    return {
        f"{_pair_key(settings, data.name, gradients, a, b)}.json"
        for gradients in measured or [None]
        for a in keys
        for b in keys
    }


def key_of(plan: ChainPlan) -> str:
    """Stands for all that is read of a chain: its files are of one run, so two of them, which hold every kind of its
    numbers, will do.
    """
    return key_of_folder(plan.folder, plan.cycles)


def key_of_folder(folder: ChainFolder, cycles: int) -> str:
    return "-".join(file_sha256(folder.cycle(cycle).core)[:16] for cycle in (0, cycles - 1))


def _read(plan: ChainPlan, label: str) -> ChainResult:
    try:
        return chain_result(plan, label)
    except UNREADABLE as error:
        raise DamagedChain(label, plan.folder.path, error) from error


def unfinished(plan: ChainPlan) -> str:
    """Why a chain has no last core."""
    failure = plan.folder.failure()
    return "not finished" if failure is None else failure.reason


def _kept_chains(plans: Sequence[ChainPlan], rows: int, effect_rows: int) -> int:
    """How many chains stay in memory. rows: that activations are compared on, and effects."""
    largest = 1
    for plan in plans:
        record = plan.folder.records()[plan.cycles - 1]
        sae = plan.folder.cycle(0).sae
        size = sae.stat().st_size if present(sae) else 0  # what is missing is said where it is read
        # fp32 and whether it is active; of each cycle's core the latter alone.
        encoded = record.core_out * (
            LATENTS_ENCODED * (5 * rows + 5 * effect_rows) + plan.cycles * min(rows, COURSE_ROWS)
        )
        largest = max(largest, 2 * size + encoded)
    return max(2, KEPT_BYTES // largest)


def identity(plan: ChainPlan, label: str | None = None) -> ChainIdentity:
    """What a chain is compared as; label: another name than the plan's."""
    fields = dict(plan.fields)
    seed, data_seed, part, k = (fields.pop(name) for name in ("seed", "data_seed", "part", "k"))
    return ChainIdentity(
        label=label or plan.label,
        arm=plan.arm,
        seed=seed,
        data_seed=data_seed,
        part=None if part is None else (part["part"], part["parts"]),
        k=k,
        rest=fields_key(fields | {"cycles": plan.cycles}),
    )


def chain_result(plan: ChainPlan, label: str | None = None) -> ChainResult:
    """What comparison needs of one chain: its last core and SAE, cycle 0's SAE and candidates by score, and the core of
    every cycle.
    """
    last, first = plan.folder.cycle(plan.cycles - 1), plan.folder.cycle(0)
    core = Core.load(last.core)
    sae, stored = MatryoshkaSAE.load(last.sae)
    start, stored_at_start = MatryoshkaSAE.load(first.sae)
    return ChainResult(
        chain=identity(plan, label),
        core=core,
        sae=MeasuredLatents.of(sae, stored["density"], core.scale),
        core_ids_C=core.latent_ids_C,
        start=MeasuredLatents.of(start, stored_at_start["density"], core.scale),
        start_ids_N=rank(load_scores(first.scores)).ids_N,
        start_has_core=start.core_size > 0,
        course=course_of(plan),
    )


def course_of(plan: ChainPlan) -> tuple[CycleCore, ...]:
    """The core of every cycle, with the tokens that the chain was trained on until then."""
    course, tokens = [], 0
    for cycle, record in enumerate(plan.folder.records()[: plan.cycles]):
        tokens += record.tokens
        exempt = record.core_in if plan.config.sae.core_gate == "relu" else 0
        course.append(CycleCore.of(Core.load(plan.folder.cycle(cycle).core), tokens, exempt))
    return tuple(course)

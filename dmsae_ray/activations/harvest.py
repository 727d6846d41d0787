"""Making a dataset: documents -> token sequences on disk -> residual stream -> shards -> manifest.

A shard is a unit of work whose bytes depend only on the configuration: which sequences it holds is planned before anyone
computes, every forward pass has one fixed padded shape and thread count. So any number of actors gives the same files, and
a finished one is kept. Letters: N sequences, T context, D model dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dmsae_ray.activations.dataset import ActivationDataset, DatasetError, Manifest, scale_of
from dmsae_ray.activations.shard import DTYPES, ShardError, file_sha256, open_shard, read_rows, write_shard
from dmsae_ray.config import Config, fields_key
from dmsae_ray.corpus.documents import corpus_fingerprint, load_documents
from dmsae_ray.corpus.split import split_of
from dmsae_ray.corpus.tokens import TokenSequences, tokenise
from dmsae_ray.lm.model import LanguageModel, load_tokenizer, model_info

SPLITS = ("train", "attribution", "evaluation")
# Purposes of random draws, apart from those of order.py.
SEQUENCES, SHARD_ROWS = 201, 202


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: these sequences' non-BOS rows, permuted, cut to `rows`."""

    name: str
    number: int
    sequences: tuple[int, ...]
    rows: int


def plan_shards(lengths_N: np.ndarray, tokens: int, calibration: int, per_shard: int, per_group: int, seed: int) -> list[ShardPlan]:
    """Deal a seeded permutation of all sequences to the calibration shard and to the training shards.

    No sequence is in two shards, so the calibration rows are held back from training.
    Raises ValueError if the corpus is too small.
    """
    order = np.random.default_rng([seed, SEQUENCES]).permutation(len(lengths_N))
    ends = np.cumsum(lengths_N[order] - 1)  # BOS is never a row
    whole = tokens - tokens % per_group
    sizes = [calibration] + [min(per_shard, whole - done) for done in range(0, whole, per_shard)]
    plans, first = [], 0
    for number, rows in enumerate(sizes):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + rows))
        if last >= len(order):
            raise ValueError(
                f"harvest.tokens {tokens} + harvest.calibration_tokens {calibration}: the corpus's training split gives only "
                f"{int(ends[-1]) if len(ends) else 0} rows; ask for fewer, or give corpus.source more text"
            )
        name = "calibration" if number == 0 else f"train-{number - 1:05d}"
        plans.append(ShardPlan(name, number, tuple(int(i) for i in order[first : last + 1]), int(rows)))
        first = last + 1
    return plans


def prepare_tokens(config: Config, tokenizer, folder: Path) -> dict[str, TokenSequences]:
    """The three splits as token sequences, read from disk or made and kept there.

    Attribution and evaluation sequences are stored in a seeded order, so that any first part of them is a sample.
    """
    paths = {split: folder / f"{split}.safetensors" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return {split: TokenSequences.load(path) for split, path in paths.items()}
    corpus = config.corpus
    texts: dict[str, list] = {split: [] for split in SPLITS}
    for number, document in enumerate(load_documents(corpus.source, corpus.text_field, corpus.revision)):
        if number == corpus.documents:
            break
        texts[split_of(document.text, corpus.attribution_share, corpus.evaluation_share)].append(document)
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split in SPLITS:
        sequences = tokenise(texts[split], tokenizer, config.model.context)
        if split != "train":
            sequences = sequences.take(np.random.default_rng([config.harvest.seed, SEQUENCES]).permutation(len(sequences)))
        made[split] = sequences
    for split in SPLITS:
        made[split].save(paths[split], {"corpus": corpus.source, "split": split})
    return made


def check_held_out(config: Config, sequences: dict[str, TokenSequences]) -> None:
    """Raises ValueError if attribution or evaluation asks for more tokens than its split has."""
    for split, field, wanted in (
        ("attribution", "attribution.tokens", config.attribution.tokens),
        ("evaluation", "evaluate.tokens", config.evaluate.tokens),
    ):
        if (have := sequences[split].tokens) < wanted:
            raise ValueError(f"{field} {wanted}: the corpus's {split} split has only {have}; ask for fewer or raise corpus.{split}_share")


class ShardMaker:
    """A Ray Data actor: holds the language model, writes one shard per call."""

    def __init__(self, config: Config, folder: str, key: str):
        torch.set_num_threads(config.harvest.threads)
        self.config, self.folder, self.key = config, Path(folder), key
        device = "cuda" if config.harvest.gpus_per_actor else "cpu"
        self.lm = LanguageModel.of(config.model, device)
        self.sequences = TokenSequences.load(self.folder / "tokens" / "train.safetensors")

    def __call__(self, batch: dict) -> dict:
        plans = [ShardPlan(**plan | {"sequences": tuple(plan["sequences"])}) for plan in batch["plan"]]
        entries = [make_shard(self.lm, self.sequences, plan, self.config, self.folder, self.key) for plan in plans]
        return {name: np.array([entry[name] for entry in entries]) for name in ("file", "rows", "bytes", "sha256")}


def make_shard(lm, sequences: TokenSequences, plan: ShardPlan, config: Config, folder: Path, key: str) -> dict:
    """Compute and write one shard; returns its manifest entry.

    Raises ValueError naming the document's token if a value does not fit the stored dtype.
    """
    harvest = config.harvest
    dtype = DTYPES[harvest.dtype]
    rows, per_forward = [], harvest.sequences_per_forward
    for first in range(0, len(plan.sequences), per_forward):
        picked = np.array(plan.sequences[first : first + per_forward])
        # The last batch is padded with copies of its first sequence: the forward shape never changes.
        shape = np.concatenate([picked, np.repeat(picked[:1], per_forward - len(picked))])
        ids_NT = torch.from_numpy(sequences.ids[shape].astype(np.int64))
        resid_NTD = lm.sites(ids_NT, [lm.hook])[lm.hook][: len(picked)]
        keep_NT = lm.rows(ids_NT[: len(picked)], torch.from_numpy(sequences.lengths[picked].astype(np.int64)))
        kept = resid_NTD[keep_NT]
        stored = kept.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            n, t = (keep_NT & ~torch.isfinite(resid_NTD.to(dtype)).all(dim=2)).nonzero()[0].tolist()
            piece = lm.tokenizer.decode(sequences.ids[picked[n], max(0, t - 8) : t + 1])
            why = "the model gives NaN or infinity there" if not bool(torch.isfinite(resid_NTD[n, t]).all()) else (
                f"its largest value {float(resid_NTD[n, t].abs().max()):.3g} does not fit; use harvest.dtype bfloat16"
            )
            raise ValueError(f"shard {plan.name}, harvest.dtype {harvest.dtype}: activation at the end of {piece!r}: {why}")
        rows.append(stored)
    rows_ND = torch.cat(rows)[: plan.rows]
    assert len(rows_ND) == plan.rows
    permutation = np.random.default_rng([harvest.seed, SHARD_ROWS, plan.number]).permutation(plan.rows)
    path = folder / "shards" / f"{plan.name}.parquet"
    write_shard(path, rows_ND[torch.from_numpy(permutation)], harvest.rows_per_group, {"dataset": key, "hook": config.model.hook})
    return shard_entry(folder, path, plan.rows)


def shard_entry(folder: Path, path: Path, rows: int) -> dict:
    return {"file": str(path.relative_to(folder)), "rows": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def dataset_identity(config: Config) -> tuple[str, dict, str, str]:
    """(key, fields, model fingerprint, corpus fingerprint) of the dataset this configuration asks for; loads no weights."""
    model = model_info(config.model.name, config.model.revision)
    corpus = corpus_fingerprint(config.corpus.source, config.corpus.text_field, config.corpus.revision)
    fields = config.dataset_fields(model.fingerprint, corpus)
    return fields_key(fields), fields, model.fingerprint, corpus


def find_dataset(config: Config) -> ActivationDataset | None:
    """The finished dataset of this configuration, checked; None if it has yet to be harvested.

    Raises DatasetError or ShardError if what is there is damaged or, for `harvest.dataset`, not what is asked for.
    """
    key, fields, _, _ = dataset_identity(config)
    folder = config.harvest.dataset or config.home / "data" / key
    if config.harvest.dataset is None and not (folder / "manifest.json").exists():
        return None
    dataset = ActivationDataset(folder)
    dataset.expect(fields)
    if config.harvest.dataset is None and any(not path.exists() for path in [*dataset.paths(), dataset.calibration_path]):
        return None
    dataset.verify()
    check_held_out(config, {split: TokenSequences.load(dataset.tokens_path(split)) for split in SPLITS[1:]})
    return dataset


class Harvest:
    """Making what is missing of one dataset. Planning needs no Ray and raises ValueError if the corpus cannot give it."""

    def __init__(self, config: Config):
        self.config = config
        self.key, self.fields, self.model_fingerprint, self.corpus_fingerprint = dataset_identity(config)
        self.folder = config.home / "data" / self.key
        h = config.harvest
        tokenizer = load_tokenizer(config.model.name, config.model.revision)
        sequences = prepare_tokens(config, tokenizer, self.folder / "tokens")
        check_held_out(config, sequences)
        self.plans = plan_shards(sequences["train"].lengths, h.tokens, h.calibration_tokens, h.rows_per_shard, h.rows_per_group, h.seed)
        (self.folder / "shards").mkdir(exist_ok=True)
        self.entries = {}
        for plan in self.plans:
            path = self.folder / "shards" / f"{plan.name}.parquet"
            if path.exists() and _finished(path, plan, self.key):
                self.entries[plan.name] = shard_entry(self.folder, path, plan.rows)

    def run(self, say: Callable[[str], None], actors: int) -> ActivationDataset:
        """Make the missing shards with so many actors on the connected Ray cluster, and open the dataset."""
        missing = [plan for plan in self.plans if plan.name not in self.entries]
        say(
            f"harvest: {sum(p.rows for p in self.plans):,} tokens of {self.config.model.name} at {self.config.model.hook} into "
            f"{len(self.plans)} shards" + (f", {len(self.entries)} kept from before" if self.entries else "")
        )
        start, first, done, total = time.monotonic(), None, 0, sum(plan.rows for plan in missing)
        for entry in self._make(missing, actors) if missing else ():
            self.entries[Path(entry["file"]).stem] = entry
            done += entry["rows"]
            now = time.monotonic()
            if first is None:
                first = now, done  # actors start and load the model before this: no rate can be told yet
            rate = (done - first[1]) / (now - first[0]) if done > first[1] else None
            pace = f", {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left" if rate else ""
            say(f"harvest: {done:,} of {total:,} tokens{pace}")
        say(f"harvest: done in {time.monotonic() - start:.0f} s")
        return self._finish()

    def _make(self, missing: list[ShardPlan], actors: int) -> Iterator[dict]:
        """Manifest entries of shards as they are finished, in any order."""
        import ray.data

        harvest = self.config.harvest
        ray.data.DataContext.get_current().enable_progress_bars = False
        shards = ray.data.from_items([{"plan": asdict(plan)} for plan in missing], override_num_blocks=len(missing)).map_batches(
            ShardMaker, fn_constructor_kwargs={"config": self.config, "folder": str(self.folder), "key": self.key},
            batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(missing)))),
            num_cpus=1, num_gpus=harvest.gpus_per_actor,
        )  # fmt: skip
        for row in shards.iter_rows():
            yield {name: row[name] for name in ("file", "rows", "bytes", "sha256")}

    def _finish(self) -> ActivationDataset:
        """Scale and mean from the calibration rows and, last, the manifest."""
        training = [self.entries[plan.name] for plan in self.plans if plan.name != "calibration"]
        calibration = self.entries["calibration"]
        if (self.folder / "manifest.json").exists():
            known = ActivationDataset(self.folder)
            if known.manifest.shards != training or known.manifest.calibration != calibration:
                raise DatasetError(
                    f"{self.folder}: a shard made again is not the one the manifest knows (another CPU model or library set gives "
                    "other last bits). Chains trained on the old shards stay as they are; for new ones change harvest.seed or "
                    "harvest.dataset"
                )
            return known
        # The dimension is the file's own: a row is 2 * d bytes.
        d = open_shard(self.folder / calibration["file"]).schema_arrow.field(0).type.byte_width // 2
        config = self.config
        rows_ND = read_rows(self.folder / calibration["file"], d, config.harvest.dtype)
        Manifest(
            key=self.key, model=config.model.name, model_fingerprint=self.model_fingerprint,
            corpus_fingerprint=self.corpus_fingerprint, hook=config.model.hook, d=d, dtype=config.harvest.dtype,
            context=config.model.context, seed=config.harvest.seed, rows_per_group=config.harvest.rows_per_group,
            scale=scale_of(rows_ND), mean=rows_ND.double().mean(dim=0).tolist(), shards=training, calibration=calibration,
            fields=self.fields,
        ).save(self.folder)  # fmt: skip
        return ActivationDataset(self.folder)


def _finished(path: Path, plan: ShardPlan, key: str) -> bool:
    """Whether the file is this plan's shard: written whole (it was renamed last), by this configuration."""
    try:
        metadata = open_shard(path)
    except ShardError:
        return False
    return metadata.metadata.num_rows == plan.rows and metadata.schema_arrow.metadata.get(b"dataset") == key.encode()

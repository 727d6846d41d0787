"""Which finished datasets of activations there are, and whether one is what a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dmsae_ray.activations.dataset import ActivationDataset, read_held_out
from dmsae_ray.activations.found import Found, keep, state_of
from dmsae_ray.config import Config
from dmsae_ray.corpus.mixture import check_mixture, mixture_fingerprint
from dmsae_ray.corpus.prepare import check_held_out, held_out_tokens, prepare_tokens
from dmsae_ray.corpus.split import Deal
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.files import elsewhere
from dmsae_ray.identity import fields_key
from dmsae_ray.lm.source import info_of, tokenizer_of
from dmsae_ray.store import Missing, Store, StoreError


class Identity:
    """What names the datasets of a configuration; loads no weights."""

    def __init__(self, config: Config):
        self.config, self.info = config, info_of(config.model)
        self.corpus = mixture_fingerprint(config.corpus)
        self.chat_template = self.info.chat_template if check_mixture(config.corpus) else None
        """stands for the tokenizer's template, where documents are chat messages"""

    @property
    def found(self) -> Found:
        return Found(self.info.fingerprint, self.corpus, self.chat_template)

    def fields(self, hook: str) -> dict:
        return self.found.fields(self.config, hook)

    def key(self, hook: str) -> str:
        return self.found.key(self.config, hook)

    @property
    def tokens_key(self) -> str:
        """Names the token sequences, which all hooks share. How many are wanted is no part of it: more of them begin
        with the same.
        """
        fields, deal = self.fields(""), Deal.of(self.config)
        return fields_key(
            {name: fields[name] for name in ("format", "corpus", "corpus_fingerprint", "model_fingerprint")}
            | {
                "context": fields["model"]["context"],
            }
            | ({"deal": asdict(deal)} if deal.parts > 1 else {})
        )

    @property
    def tokens(self) -> Path:
        """The folder of the token sequences."""
        return self.config.home / "tokens" / self.tokens_key

    def store(self, hook: str) -> Store:
        """Where a hook's dataset lies, or will."""
        return dataset_store(self.config, hook, self.key(hook))


def dataset_store(config: Config, hook: str, key: str) -> Store:
    """Where the dataset of a hook with this key lies, or will."""
    if config.harvest.dataset is not None and hook == config.model.hook:
        return Store(config.harvest.dataset)
    return shards_of(config).child(key)


def shards_of(config: Config) -> Store:
    """Where the datasets lie that a configuration harvests: at `harvest.store`, else with the rest of the output."""
    place = elsewhere(config.home)
    if config.harvest.store is not None or place is None:
        return Store(config.harvest.store or config.home / "data")
    return Store(place.url).child("data")


def remember(config: Config) -> None:
    """Keep what names the datasets in the output folder, which the caller holds: `sweep --status` need not look again.

    Nothing is kept if a file changes meanwhile. Raises ValueError if model or corpus cannot be read.
    """
    state = state_of(config)
    found = Identity(config).found
    if state_of(config) == state:
        keep(config.home, state, found)


def find_datasets(
    config: Config, hooks: tuple[str, ...], say: Callable[[str], None] = lambda line: None
) -> dict[str, ActivationDataset | None]:
    """The finished datasets of these hooks, checked; None where something has yet to be harvested.

    Where the configuration looks at more held-out tokens than were read, they are read now: the caller holds the output
    folder.

    Raises DatasetError, ShardError or StoreError if what is there is damaged or, for `harvest.dataset`, not what is
    asked for.
    """
    identity = Identity(config)
    return {hook: _find(config, identity, hook, say) for hook in hooks}


def _find(config: Config, identity: Identity, hook: str, say: Callable[[str], None]) -> ActivationDataset | None:
    store, given = identity.store(hook), config.harvest.dataset is not None
    if not given and store.size("manifest.json") is None:
        return None
    dataset = ActivationDataset(store)
    dataset.expect(identity.fields(hook))
    splits = Deal.of(config).held_out
    needed = {entry.file for entry in dataset.entries()} | {f"tokens/{split}.safetensors" for split in splits}
    if not given and not needed <= store.sizes("shards").keys() | store.sizes("tokens").keys():
        return None
    dataset.verify()
    held_out = {split: dataset.held_out(split) for split in splits}
    wanted = held_out_tokens(config)
    short = {
        split: wanted[split] for split in splits if held_out[split].tokens < wanted[split] and not held_out[split].ends
    }
    if short and not given:  # the corpus has more than was read of it
        say(
            "tokens: reading on in the corpus, for "
            f"{' and '.join(f'{tokens:,} tokens of {split}' for split, tokens in short.items())}"
        )
        deal, tokenizer = Deal.of(config), tokenizer_of(config.model)
        prepare_tokens(config.corpus, tokenizer, config.model.context, identity.tokens, short, say, deal)
        _store_held_out(identity.tokens, store, tuple(short))
        held_out = {split: dataset.held_out(split) for split in splits}
    check_held_out(config, held_out)
    return dataset


def _store_held_out(tokens: Path, store: Store, splits: tuple[str, ...]) -> None:
    """Put held-out sequences beside the shards, unless there are as many: a store may be shared with whoever asked for
    more.
    """
    for split in splits:
        path = tokens / f"{split}.safetensors"
        if TokenSequences.load(path).tokens > _tokens_in(store, split):
            store.write(f"tokens/{split}.safetensors", path.read_bytes())


def _tokens_in(store: Store, split: str) -> int:
    """Held-out tokens that a dataset already has. Raises StoreError if its place cannot be read."""
    try:
        return read_held_out(store, split).tokens
    except ValueError as error:
        if isinstance(error, StoreError) and not isinstance(error, Missing):
            raise
        return 0  # missing or damaged

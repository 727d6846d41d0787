"""The whole experiment as one typed tree.

Read this file first: its sections are the stages of a sweep, in order. A configuration is a YAML file (`--config`) with
overrides from the command line (`--train.tokens 2_000_000`), read by driver/options.py; an unknown key is an error.
Importing this module imports neither torch nor Ray. Definitions: a latent's gate, a core, a chain, a cycle and the like
are those of dmsae_ray/README.md ("Words"); `[D]` marks a decision the literature leaves open.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dmsae_ray.config_checks import problems_of
from dmsae_ray.labels import without_spaces
from dmsae_ray.place import absolute, default_output, file_or_hub, folder_or_url, output_place, tracking_uri
from dmsae_ray.secret_url import SecretUrl


class Section(BaseModel):
    """A part of the tree: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


Share = Annotated[float, Field(gt=0, lt=1)]
# Places are absolute as soon as a configuration is made: workers have another working folder, home and environment.
Place = Annotated[Path, BeforeValidator(absolute)]
FolderOrUrl = Annotated[SecretUrl, BeforeValidator(folder_or_url)]
Output = Annotated[SecretUrl, BeforeValidator(output_place)]
Source = Annotated[SecretUrl, BeforeValidator(lambda value: file_or_hub(value, "embedded"))]
ModelName = Annotated[str, BeforeValidator(lambda value: file_or_hub(value, "tiny"))]
LabelSelector = Annotated[dict[str, str], AfterValidator(without_spaces)]
TrackingUri = Annotated[SecretUrl, BeforeValidator(tracking_uri)]


class CorpusPart(Section):
    """One source of a mixture."""

    source: Source
    """as corpus.source"""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """share of the mixture's tokens, relative to the other parts' weights"""
    text_field: str = "text"
    """as corpus.text_field"""
    revision: str | None = None
    """as corpus.revision"""


class CorpusConfig(Section):
    """Where the text comes from, how it is split and how it is cut into sequences."""

    source: Source = SecretUrl("embedded")
    """`embedded` (the text shipped with the package); a file (.txt, .md, .jsonl, .json, .csv, also as .gz or .zst;
    .parquet), a folder or glob of them, a folder of save_to_disk; or a hub data set id. Read from its beginning and as
    far as needed: shuffle what is sorted
    """
    text_field: str = "text"
    """field (column) that holds a document's text, or chat messages (a list of {role, content}) for the tokenizer's
    chat template
    """
    revision: str | None = None
    """revision of a hub data set"""
    mixture: tuple[CorpusPart, ...] = ()
    """instead of a source: parts, each {source, weight, text_field, revision}, interleaved until the one that is next
    is used up
    """
    documents: int | None = Field(None, ge=1)
    """use the first so many documents, of all parts together; empty: as many as are needed"""
    piece_characters: int | None = Field(None, ge=200)
    """cut longer documents at the ends of paragraphs into pieces of at most so many characters, documents of their own;
    empty: only a text file above 50,000, into pieces of 2,000, so that one book is a corpus
    """
    attribution_share: Share = 0.05
    """share of documents kept for attribution (by hash of the text; never trained on)"""
    evaluation_share: Share = 0.05
    """share of documents kept for evaluation (by hash of the text; never trained on)"""
    packing: Literal["separate", "concatenate"] = "separate"
    """a sequence holds tokens of one document, or documents are joined, BOS before each, so that nothing is padding [D]
    """

    @property
    def parts(self) -> tuple[CorpusPart, ...]:
        """The mixture; a single source is a mixture of one."""
        return self.mixture or (
            CorpusPart(source=self.source, weight=1, text_field=self.text_field, revision=self.revision),
        )

    @model_validator(mode="after")
    def _one_source(self) -> CorpusConfig:
        # What a mixture would ignore is refused: a text_field beside it was meant for something.
        fields = ("source", "text_field", "revision")
        both = [f"corpus.{name}" for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if self.mixture and both:
            raise ValueError(
                f"corpus.mixture and {', '.join(both)} are both given: name every source, its text_field and its "
                "revision in corpus.mixture, or leave the mixture empty"
            )
        return self


class ModelConfig(Section):
    """The language model and the place in it whose activations are studied."""

    name: ModelName = "tiny"
    """`tiny` (shipped with the package), a local folder, a GGUF file or a folder with one (it is converted once,
    into the output folder), or a hub id such as google/gemma-2-2b
    """
    revision: str | None = None
    """revision of a hub model; a run takes the commit that it stands for at its beginning"""
    bos_token: str | None = None
    """text of the token that starts every sequence, one that the tokenizer has; empty: the tokenizer's own BOS, which
    some lack (Qwen) or use otherwise
    """
    hook: str = "blocks.2.hook_resid_post"
    """place to study, by its TransformerLens name, L counted from 0: blocks.L.hook_resid_pre, .hook_resid_mid or
    .hook_resid_post (the residual stream before, within and after a block), .hook_attn_out or .hook_mlp_out (what the
    block adds to it)
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision the language model runs in"""
    context: int = Field(128, ge=8)
    """tokens per sequence, BOS included"""
    device_map: str | None = None
    """`auto`: let accelerate spread the model over the GPUs that a process (harvest actor or training worker) sees;
    empty: one device
    """


class HarvestConfig(Section):
    """Activations, written once to Parquet shards."""

    tokens: int = Field(327_680, ge=1)
    """rows (tokens) in the training shards"""
    calibration_tokens: int = Field(16_384, ge=256)
    """rows held back from training: they set the scale, and each cycle's threshold"""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """precision of the stored rows"""
    seed: int = Field(0, ge=0)
    """seed of the permutation of sequences and rows"""
    rows_per_group: int = Field(2048, ge=1)
    """rows in a Parquet row group, the unit that training permutes"""
    rows_per_shard: int = Field(65_536, ge=1)
    """rows in a shard, a multiple of rows_per_group"""
    sequences_per_forward: int = Field(32, ge=1)
    """sequences in a forward pass; fixed, so that the rows do not depend on who computed them"""
    threads: int = Field(1, ge=1)
    """CPU threads of a harvest actor"""
    actors: int | None = Field(None, ge=1)
    """harvest actors; empty: as many as the cluster holds"""
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs of a harvest actor: a share of one, or several"""
    hooks: tuple[str, ...] = ()
    """further hooks to harvest in the same pass, a dataset each; `model.hook` is always harvested"""
    outlier_norm: float | None = Field(10.0, gt=1)
    """leave out rows whose norm exceeds so many times the median norm of the calibration sequences' rows: one bound for
    training, thresholds, evaluation, nulls, attribution and features, where such positions keep what stands there;
    null: keep all [D]
    """
    outlier_reserve: Share = 0.05
    """with outlier_norm: further text set aside for each shard, as a share of its rows, to fill the places of dropped
    ones; read only where rows are dropped
    """
    store: FolderOrUrl | None = None
    """where datasets are written: a folder that all nodes share, or a URL such as s3://bucket/prefix; empty: `data` in
    the output folder
    """
    dataset: FolderOrUrl | None = None
    """use the finished dataset in this folder or URL instead of harvesting; it must match the other fields"""

    @field_validator("outlier_norm", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        """The command line's word for nothing is None, the file's is null: either is understood."""
        return None if value == "null" else value


class SAEConfig(Section):
    """One Matryoshka BatchTopK sparse autoencoder with a core."""

    width: int = Field(2048, ge=4)
    """latents, core included"""
    prefix_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    """sizes of the prefix groups as shares of the free latents; the rest is the last group [D]"""
    prefixes: Literal["fixed", "sampled"] = "fixed"
    """what has to reconstruct by itself in training: core and the first groups (`fixed`), or as many prefixes of sizes
    drawn log-uniformly anew in every step (`sampled`: ordered latents); the groups stay what is measured, and the first
    one candidates [D]
    """
    core_gate: Literal["batchtopk", "relu"] = "batchtopk"
    """`batchtopk`: core latents compete like all others; `relu`: the core is exempt from the gate [D]"""
    core_budget: Literal["counted", "exempt"] = "counted"
    """with core_gate relu: whether active core pairs count against k [D]"""
    core_transfer: Literal["frozen", "init", "random"] = "frozen"
    """`frozen`: the core's encoder rows are not trained; `init`: they start the core latents, which are then trained
    like all others; `random`, a control: in their place, as many frozen rows of the same norms but random directions,
    which have the activations' covariance and are drawn anew in every cycle
    """
    core_decoder_init: Literal["encoder", "random", "kept"] = "encoder"
    """a core latent's decoder row starts as its encoder row's direction, at random, or (`kept`) as that of the SAE in
    which the core was selected [D]
    """
    decoder: Literal["learned", "frozen_random"] = "learned"
    """`learned`: decoder rows are trained; `frozen_random`, a control: they stay as they are drawn; core_decoder_init
    kept then lets a core's members keep the rows that were drawn while they were free
    """
    core: Place | None = None
    """core file that cycle 0 is trained on, such as a consensus.safetensors; empty: none, cycle 0 trains a plain
    Matryoshka SAE
    """
    auxk_alpha: float = Field(1 / 32, ge=0)
    """weight of the loss that revives dead latents"""
    auxk_k: int | None = Field(None, ge=1)
    """dead latents used per token; empty: half the model dimension"""

    @field_validator("prefix_fractions")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0 or sum(value) >= 1:
            raise ValueError("needs at least one fraction; all above 0, together below 1 (the rest is the last group)")
        return value


class TrainConfig(Section):
    """One cycle's training."""

    tokens: int = Field(327_680, ge=1)
    """rows trained on per cycle; more than the dataset holds means several passes, each permuted anew"""
    batch: int = Field(1024, ge=1)
    """global batch in tokens"""
    lr: float = Field(3e-4, gt=0)
    """peak learning rate of Adam"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates"""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon"""
    clip: float = Field(1.0, gt=0)
    """largest norm of the whole gradient"""
    l2: float = Field(0.0, ge=0, allow_inf_nan=False)
    """adds so much times the summed squares of the trained encoder rows to the loss: in the gradient, before clip and
    Adam, as arXiv 2603.04198 does. The paper penalises decoder rows as well, which have norm 1 here; biases are not
    penalised, and the logged loss is without it [D]
    """
    warmup_steps: int = Field(1000, ge=0)
    """steps of linear warm-up, at most warmup_share of the run"""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """ceiling of the warm-up as a share of the run"""
    decay_share: float = Field(0.2, ge=0, le=1)
    """share of the run, at its end, over which the learning rate falls linearly to 0"""
    dead_window_tokens: int = Field(10_000_000, ge=1)
    """a free latent silent for so many tokens is dead, at most dead_window_share of the run"""
    dead_window_share: float = Field(0.1, gt=0, le=1)
    """ceiling of the dead window as a share of the run"""
    threshold_beta: float = Field(0.999, ge=0, lt=1)
    """decay of the running mean of the smallest kept value"""
    lanes: int = Field(8, ge=1)
    """row groups mixed in a batch; a multiple of every worker count used"""
    threads: int = Field(1, ge=1)
    """CPU threads of a training worker (part of what decides the last bit)"""
    screen: Literal["auto", "bf16", "fp32"] = "auto"
    """precision of the product that finds a batch's candidates, exact values decide among them; `auto`: the faster one.
    Never changes a result
    """
    kernels: Literal["auto", "compiled", "torch"] = "auto"
    """sparse operations of a step: `compiled` (C on CPUs, Triton on GPUs), plain `torch`, or `auto`, compiled where
    possible; differ in the order of sums
    """
    parallel: Literal["ddp", "gather", "latent"] = "ddp"
    """what the workers of a chain share: `ddp`, each computes its rows' gradient and they are summed; `gather`, rows
    and kept pairs are exchanged and each computes the whole gradient; `latent`, each holds and trains a part of the
    latents; differ in the order of sums
    """
    micro_batch: int | None = Field(None, ge=1)
    """most rows whose prefix errors, a step's largest intermediate, a worker holds at a time; empty: all; the gate is
    over the whole batch all the same; changes the order of sums
    """
    checkpoint_steps: int = Field(100, ge=1)
    """steps between checkpoints inside a cycle"""
    log_steps: int = Field(10, ge=1)
    """steps between points of the training curves"""


class AttributionConfig(Section):
    """How latents are scored, and how many stay."""

    tokens: int = Field(65_536, ge=1)
    """tokens of held-out sequences that latents are scored on; with until_jaccard, at most"""
    sequences_per_shard: int = Field(32, ge=1)
    """sequences in one unit of attribution work; fixed, so that scores do not depend on who computed them"""
    until_jaccard: float | None = Field(None, gt=0, le=1)
    """score 2, 4, 8, ... shards until the sets that carry tau of the even and of the odd ones' attribution have this
    Jaccard index; empty: score all tokens
    """
    candidates: Literal["first_group", "all"] = "first_group"
    """latents that may enter the core, and that the spliced reconstruction is made of: core + first group, nothing
    deeper; or every latent, and the whole reconstruction
    """
    splice: Literal["replace", "keep_error"] = "replace"
    """the hook carries the reconstruction from the candidates, or that plus the SAE's error [D]"""
    outlier_norm: float | None = Field(None, gt=1)
    """positions whose norm exceeds so many times the median norm of the calibration rows keep what stands there, and do
    not count; below harvest.outlier_norm, if both are set; empty: those within the bound of harvest.outlier_norm count
    [D]
    """
    aggregator: Literal["mean_abs", "quantile", "mean_signed"] = "mean_abs"
    """over tokens: mean of the absolute attribution; a quantile of it where the latent is active, times its density; or
    absolute value of the mean [D]
    """
    quantile: float = Field(0.9, gt=0, le=1)
    """which one, with aggregator quantile; to 3 % [D]"""
    tau: float = Field(0.9, gt=0, le=1)
    """share of the total attribution that the core must carry"""

    @model_validator(mode="after")
    def _quantile_is_used(self) -> AttributionConfig:
        if self.aggregator != "quantile" and self.quantile != type(self).model_fields["quantile"].default:
            raise ValueError("attribution.quantile has a meaning only with attribution.aggregator quantile")
        return self


class SelectionConfig(Section):
    """Which candidates (attribution.candidates) are the next core. Anything but attribution makes a control: a placebo
    chain through the same slot, whose candidates' attribution is measured and stored all the same."""

    by: Literal["attribution", "frequency", "reconstruction", "norm", "random"] = "attribution"
    """candidates are ranked by `attribution`; by `frequency`, their density on the evaluation tokens; by
    `reconstruction`, how much the squared error of the smallest prefix grows on those tokens when one is left out; by
    the `norm` of the encoder row; or in `random` order, from seed and cycle
    """
    size: Literal["tau", "match"] | Annotated[float, Field(gt=0, le=1)] = "tau"
    """how many are selected: `tau`, the fewest that carry attribution.tau of the attribution (by attribution only); a
    share of the candidates, such as 0.5; or `match`, in every cycle as many as the finished chain in the same output
    folder that selects by attribution and tau, hands on its cores (no random rows) and has all other fields, seed and k
    in common (by attribution only with sae.core_transfer random)
    """

    @model_validator(mode="after")
    def _size_fits(self) -> SelectionConfig:
        if self.by != "attribution" and self.size == "tau":
            raise ValueError(
                f"selection.by {self.by} has no share of the attribution to reach: set selection.size to a share of "
                "the candidates, such as 0.5, or to match for the sizes of the chain that selects by attribution"
            )
        return self


class EvaluateConfig(Section):
    """Held-out measurement at the end of every cycle."""

    tokens: int = Field(65_536, ge=1)
    """tokens of held-out sequences"""
    sequences_per_batch: int = Field(32, ge=1)
    """sequences in a forward pass"""


class FeaturesConfig(Section):
    """How the features of the finished cores are described, in features.json: where they fire, and what they do to the
    loss.
    """

    tokens: int = Field(65_536, ge=1)
    """tokens of held-out evaluation sequences that contexts are looked for in, at most"""
    most: int = Field(1000, ge=1)
    """features described: those that chains share first, then other core latents by falling score"""
    contexts: int = Field(8, ge=1)
    """contexts of a feature, each from another sequence"""
    spread: int = Field(2, ge=0)
    """how many of them come not from the top but from lower quantiles of its activation: maxima alone flatter a feature
    """
    window: int = Field(20, ge=0)
    """tokens shown before and after the one on which it is strongest"""
    effects: int = Field(8, ge=0)
    """tokens of its contexts whose loss its removal changes most; 0: nothing is removed, and the model's upper blocks
    do not run
    """
    sequences_per_batch: int = Field(32, ge=1)
    """sequences in a forward pass; their logits are made in small parts, whatever the vocabulary"""

    @model_validator(mode="after")
    def _some_from_the_top(self) -> FeaturesConfig:
        if self.spread >= self.contexts:
            raise ValueError(
                f"features.spread {self.spread} leaves none of features.contexts {self.contexts} for the largest "
                "activations: lower spread or raise contexts"
            )
        return self


class SweepConfig(Section):
    """Which chains run."""

    seeds: tuple[int, ...] = Field((0, 1), min_length=1)
    """seeds of the chains' initialisations"""
    k: tuple[int, ...] = Field((16, 32), min_length=1)
    """sparsities: active latents per token"""
    cycles: int = Field(4, ge=1)
    """cycles of a chain: cycle 0 (no core) and the distillation cycles after it"""
    data_seed: int | None = Field(None, ge=0)
    """seed of the order of data; empty: the chain's own seed"""
    data: Literal["shared", "disjoint"] = "shared"
    """`shared`: every chain reads all shards; `disjoint`: chains of different seeds train on, and are attributed on,
    different documents, since agreement on shared data overstates reproducibility. Evaluation text is the same for all
    """
    parts: int | None = Field(None, ge=2)
    """to how many parts documents are dealt when they are harvested, by the hash of their text; harvest.tokens are
    those of all parts together. With data disjoint seed s takes part s modulo parts, with data shared every chain reads
    all of them. Another number is another dataset: set it before the harvest where an arm is to have data disjoint,
    larger than needed where seeds may be added later; empty: as many as seeds with data disjoint, else nothing is dealt
    """

    @property
    def n_parts(self) -> int:
        """Parts that documents are dealt to."""
        return self.parts or (len(self.seeds) if self.data == "disjoint" else 1)

    @field_validator("seeds", "k")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("has the same entry twice")
        if min(value) < 0:
            raise ValueError("must not be negative")
        return value


ARM_SECTIONS = ("sae", "train", "attribution", "selection")
ARM_SWEEP_FIELDS = ("data", "data_seed")
WHOLE_CHAIN = "whole_chain"
"""As many tokens as all cycles of a chain of the grid, for train.tokens of an arm."""


class ArmConfig(Section):
    """Further chains beside the grid of `sweep`, that differ from it in something: a control, a variant, a baseline."""

    fields: dict[str, Any] = {}
    """what differs, by dotted name, such as {selection.by: random, selection.size: match}: fields of sae, train,
    attribution and selection, and sweep.data, sweep.data_seed. train.tokens: whole_chain stands for as many tokens as a
    chain of the grid is trained on in all its cycles
    """
    seeds: tuple[int, ...] = ()
    """seeds; empty: those of the sweep"""
    k: tuple[int, ...] = ()
    """sparsities; empty: those of the sweep"""
    cycles: int | None = Field(None, ge=1)
    """cycles of a chain; empty: as in the sweep; 1: plain Matryoshka SAEs, which never have a core"""
    core: Literal["none", "distilled"] = "none"
    """`none`: chains begin without a core; `distilled`: transfer, one chain on the last core of every chain of the grid
    with one of these seeds, at each of these k but the core's own
    """

    @field_validator("fields")
    @classmethod
    def _may_differ(cls, value: dict[str, Any]) -> dict[str, Any]:
        allowed = " and ".join(
            [", ".join(f"{name}.*" for name in ARM_SECTIONS), ", ".join(f"sweep.{name}" for name in ARM_SWEEP_FIELDS)]
        )
        for name in value:
            section, _, field = name.partition(".")
            if not (section in ARM_SECTIONS and field) and name not in [f"sweep.{field}" for field in ARM_SWEEP_FIELDS]:
                raise ValueError(
                    f"{name} cannot differ in an arm: chains are compared on the same data; may differ: {allowed}"
                )
        return value | {name: absolute(core) for name, core in value.items() if name == "sae.core"}


class ExpectConfig(Section):
    """An outcome, stated before the run: a number of the results beside what it is expected to be above or below."""

    claim: str
    """in plain words"""
    value: str
    """name of a number of the results, such as consistency.base.seed.pw_mcc (`dmsae_ray.report --numbers` lists them)
    """
    above: float | str | None = None
    """number, or name of one, that it is expected to exceed"""
    below: float | str | None = None
    """number, or name of one, that it is expected to stay under"""

    @model_validator(mode="after")
    def _one_bound(self) -> ExpectConfig:
        if self.above is None and self.below is None:
            raise ValueError(f"{self.claim!r} names no bound: set above, below or both")
        return self


class StudyConfig(Section):
    """What runs beside the sweep's grid, and what is expected of the results."""

    arms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], ArmConfig] = {}
    """arms by name, such as {random: {fields: {selection.by: random, selection.size: match}, seeds: [0, 1], k: [16]}}
    """
    expect: tuple[ExpectConfig, ...] = ()
    """expected outcomes, each {claim, value, above, below}; the report says which were met, missed, or are open: a 95 %
    interval decides, where there are four seeds or more
    """

    @field_validator("arms")
    @classmethod
    def _names(cls, value: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        if "base" in value:
            raise ValueError("an arm cannot be called base: that is the grid of sweep.seeds and sweep.k")
        return value


class CompareConfig(Section):
    """How cores are compared."""

    pairs: Literal["all", "sample"] = "all"
    """`all` pairs of chains, within an arm and, across arms, of equal seed and k; or a `sample` of them"""
    sample: int | None = Field(None, ge=1)
    """with pairs sample: at most so many pairs of every group (same arms, same difference), drawn by compare.seed"""
    consensus: float = Field(0.5, gt=0, le=1)
    """a feature is in the consensus core if at least this share of the seeds, and at least two, have it [D]"""

    draws: int = Field(200, ge=100)
    """draws of each null distribution; fewer than a hundred carry no 99th percentile, by which agreement is judged"""
    cosine: float = Field(0.7, gt=0, lt=1)
    """a latent is shared if encoder and decoder cosine both reach this"""
    max_latents: int = Field(8192, ge=1)
    """largest prefix of whole dictionaries that is matched (assignment costs its cube)"""
    seed: int = Field(0, ge=0)
    """seed of the null draws"""

    @model_validator(mode="after")
    def _sample_has_a_size(self) -> CompareConfig:
        if (self.pairs == "sample") != (self.sample is not None):
            raise ValueError(
                "compare.pairs sample and compare.sample, the number of pairs of a group, go together: give both or "
                "neither"
            )
        return self


class ClusterConfig(Section):
    """What the work may use. Nothing here decides a number, except that `workers` changes the order of sums, and so
    last bits.
    """

    address: str | None = None
    """Ray cluster to join; `local`: start one; empty: RAY_ADDRESS, else the one `ray start` made on this machine, else
    a new one
    """
    workers: int = Field(1, ge=1)
    """training workers of a chain (see train.parallel); a stopped chain may go on with another number"""
    min_workers: int | None = Field(None, ge=1)
    """fewest with which a chain begins, or goes on where nodes are lost, until there is room for all; empty: all"""
    cpus_per_worker: float = Field(0.5, gt=0)
    """logical CPUs a training worker asks Ray for"""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs a training worker asks Ray for; a part of one only where a chain has one worker"""
    gpu_gb: float | None = Field(None, gt=0)
    """memory of one of the cluster's GPUs, GB (10^9 bytes), that each stage's need is compared with before anything
    starts; empty: that of this machine's GPU, if it has one
    """
    concurrent: int | None = Field(None, ge=1)
    """chains at once; empty: as many as fit, more when nodes join"""
    label_selector: LabelSelector = Field(default_factory=dict)
    """labels of the nodes on which training workers and the language model run, with values as Ray reads them: a, !a,
    in(a, b) or !in(a, b); read tasks run on any node
    """
    accelerator_type: str | None = Field(None, min_length=1)
    """accelerator of those nodes, by Ray's name of it, such as A100"""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """where a chain's workers go: on few nodes or on many if possible, or (STRICT_) on one, or on as many nodes"""
    wait_for_nodes: float | None = Field(None, ge=0)
    """minutes to wait for nodes where the cluster has too few for one chain; empty: for ever if it has an autoscaler,
    else not at all
    """
    lockstep: int = Field(1, ge=1)
    """chains that advance together in one worker group, on one stream and one language model, where they read the same
    batches (all k and arms of a seed; all chains with sweep.data_seed set): data are read once, and each chain's result
    is what it is alone
    """
    scratch: Place = Field(default_factory=lambda: Path(tempfile.gettempdir()))
    """with an output at a URL: folder on each node's own disk, of one name on all, in which what a node works on is
    kept; left out: that for temporary files
    """
    object_store_mb: int = Field(512, ge=64)
    """shared memory that the data stream of one training worker may fill, MB; ten row groups must fit"""
    read_tasks: int = Field(2, ge=1)
    """tasks that read shards for one worker at the same time; each is a process"""
    fetch_ahead: int = Field(8, ge=1)
    """row groups that a read task fetches at the same time from a remote store"""
    retries: int = Field(2, ge=0)
    """restarts of a chain whose worker or node was lost, and of its driver where that was lost"""

    @property
    def fewest_workers(self) -> int:
        return self.min_workers or self.workers


class TrackConfig(Section):
    """Where results are logged."""

    uri: TrackingUri | None = None
    """MLflow tracking URI; empty: a sqlite database in the output folder"""
    experiment: str = "dmsae_ray"
    """MLflow experiment"""


class Config(BaseSettings):
    """A sweep of distillation chains."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, cli_hide_none_type=True, cli_avoid_json=True
    )

    name: str = Field("quickstart", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """names the sweep, and its folder"""
    output: Output | None = None
    """lasting folder for everything made, or a URL such as s3://bucket/prefix: then nodes need no shared disk; left
    out: $DMSAE_RAY_HOME/<name>, or ~/dmsae_ray/<name>
    """
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = ModelConfig()
    harvest: HarvestConfig = HarvestConfig()
    sae: SAEConfig = SAEConfig()
    train: TrainConfig = TrainConfig()
    attribution: AttributionConfig = AttributionConfig()
    selection: SelectionConfig = SelectionConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    features: FeaturesConfig = FeaturesConfig()
    sweep: SweepConfig = SweepConfig()
    study: StudyConfig = StudyConfig()
    compare: CompareConfig = CompareConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
    ):
        # No environment variables: what a run used must be visible in its file and its command line (driver/options.py
        # adds those).
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _has_an_output(cls, tree: Any) -> Any:
        # Settled here, in the driver: a worker has another home and another environment.
        if not isinstance(tree, dict) or tree.get("output") is not None:
            return tree
        return tree | {"output": str(default_output(str(tree.get("name") or cls.model_fields["name"].default)))}

    @model_validator(mode="after")
    def _cross_check(self) -> Config:
        if problems := problems_of(self):
            raise ValueError("\n".join(problems))
        return self

    def of_arm(self, name: str) -> Config:
        """The experiment of one arm of the study. Raises pydantic's ValidationError."""
        arm = self.study.arms[name]
        tree: dict[str, Any] = {
            name: value.model_dump() if isinstance(value, BaseModel) else value
            for name, value in self.sections().items()
        }
        tree["study"] = {}
        for field, value in arm.fields.items():
            section, _, rest = field.partition(".")
            tree[section][rest] = self.chain_tokens if (field, value) == ("train.tokens", WHOLE_CHAIN) else value
        parts = self.sweep.n_parts
        tree["sweep"] |= {
            "parts": parts if parts > 1 else None,  # those of the one dataset that all arms read
            "seeds": arm.seeds or self.sweep.seeds,
            "k": arm.k or self.sweep.k,
            "cycles": arm.cycles or self.sweep.cycles,
        }
        return Config(**tree)

    @property
    def chain_tokens(self) -> int:
        """What a chain of the grid is trained on in all its cycles; what fills no batch is dropped in each."""
        return self.sweep.cycles * (self.train.tokens // self.train.batch * self.train.batch)

    @property
    def home(self) -> Path:
        """Absolute output folder, the same in every process. With an output at a URL it is the one that stands for it
        on this machine, from the first call on in this process (mirror.py).
        """
        assert self.output is not None, "every configuration has one from its beginning"
        if not self.output.is_url:
            return Path(self.output.reveal())
        from dmsae_ray.mirror import folder_for, mirror_of

        return mirror_of(self.output, folder_for(self.output, self.cluster.scratch)).folder

    @property
    def place(self) -> str:
        """The output folder, for people: a URL without its options."""
        assert self.output is not None, "every configuration has one from its beginning"
        return self.output.place if self.output.is_url else str(self.home)

    def sections(self) -> dict[str, Any]:
        """What `Config` makes the same experiment of: its fields by name (command flags excluded), secrets of URLs
        included.
        """
        return {name: getattr(self, name) for name in Config.model_fields}

    def section_dict(self) -> dict[str, Any]:
        """The experiment as plain JSON types, as it is kept and logged (command flags excluded): secrets of URLs are
        masked.
        """
        return {name: json.loads(_dump_json(getattr(self, name))) for name in Config.model_fields}

    def data_seed_of(self, seed: int) -> int:
        return seed if self.sweep.data_seed is None else self.sweep.data_seed

    @property
    def hooks(self) -> tuple[str, ...]:
        """Every hook that is harvested, `model.hook` first."""
        return (self.model.hook, *(hook for hook in self.harvest.hooks if hook != self.model.hook))

    def chain_label(self, seed: int, k: int) -> str:
        """A chain's name on screen and in MLflow: its place in the grid and, since controls lie beside the plain chains
        of an output folder, what makes it a control."""
        transfer = {"frozen": [], "init": ["init"], "random": ["random-rows"]}[self.sae.core_transfer]
        controls = [self.selection.by] * (self.selection.by != "attribution") + transfer
        return "-".join([f"seed{seed}-k{k}", *controls])

    def distilled(self) -> Config:
        """The same experiment with cores selected by attribution and tau and, where random rows stand in their place,
        frozen: its chains are those that placebos are matched to.
        """
        sae = self.sae.model_copy(update={"core_transfer": "frozen"} if self.sae.core_transfer == "random" else {})
        return self.model_copy(update={"selection": SelectionConfig(), "sae": sae})


def _dump_json(value: Any) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(str(value) if isinstance(value, Path | SecretUrl) else value)

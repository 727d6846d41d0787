"""One run of the evaluation: saved SAEs measured on held-out text, in this process.

A sweep measures every cycle once, on evaluate.tokens. This measures the same on other lengths of the same text, and
keeps it beside each SAE: what is there is not measured again."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch

from dmsae_ray.activations.catalogue import find_datasets
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config, EvaluateConfig
from dmsae_ray.distill.folder import CycleFolder
from dmsae_ray.distill.grid import planned
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.driver.options import EvaluateCommand
from dmsae_ray.driver.preflight import pinned
from dmsae_ray.driver.session import session
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import read_references, references_of, references_path, write_references
from dmsae_ray.files import file_sha256, present, refresh, write_json
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.show.terminal.console import terminal_console
from dmsae_ray.show.terminal.progress import duration
from dmsae_ray.show.terminal.tables import evaluation_tables
from dmsae_ray.yaml_file import read_yaml

FORMAT_VERSION = 1
SAY_SECONDS = 10.0
"""Shortest time between two lines of progress on one SAE."""


def run(command: EvaluateCommand) -> int:
    """Raises ValueError on bad input before anything is measured."""
    config = pinned(Config(**command.sections()))
    refresh(config.home)
    saved = saved_saes(config, trained_with(command), command.chain, command.all)
    # Under the lock: a driver that starts meanwhile would tidy away what is being written.
    with session(config, "evaluate", command.verbose) as (_, say):
        dataset = find_datasets(config, (config.model.hook,), say)[config.model.hook]
        if dataset is None:
            raise ValueError(
                f"{config.home}: its dataset is not complete; run `python -m dmsae_ray.harvest` with the same "
                "configuration"
            )
        rows = Evaluation(config, dataset, say).run(saved)
        terminal_console(say.stream).print(evaluation_tables(rows))
        say(f"kept as evaluation-{config.evaluate.tokens}.json beside each SAE in {config.home / 'chains'}")
    return 0


def trained_with(command: EvaluateCommand) -> Config:
    """The experiment by which the chains were trained: with the file's evaluation, since that is part of what names a
    chain.
    """
    evaluate = EvaluateConfig(**read_yaml(command.config).get("evaluate") or {})
    return Config(**command.sections() | {"evaluate": evaluate})


@dataclass(frozen=True)
class Saved:
    """One SAE on disk."""

    plan: ChainPlan
    cycle: int

    @property
    def folder(self) -> CycleFolder:
        return self.plan.folder.cycle(self.cycle)


def saved_saes(config: Config, trained: Config, chain: str | None, every: bool) -> list[Saved]:
    """The SAEs that were asked for, by chain and cycle: the last one of each finished chain, or every finished one.

    chain: label or key of the only chain. Raises ValueError if there is none.
    """
    plans = planned(trained)
    if chain is not None:
        labels = ", ".join(plan.label for plan in plans)
        plans = [plan for plan in plans if chain in (plan.label, plan.key)]
        if not plans:
            raise ValueError(f"--chain {chain}: no chain of this configuration; it has {labels}")
    done = {plan.key: min(len(plan.folder.records()), plan.cycles) for plan in plans}
    saved = [
        Saved(plan, cycle) for plan in plans for cycle in range(done[plan.key]) if every or cycle == plan.cycles - 1
    ]
    if not saved:
        lacking = "has a finished cycle" if every else "is finished (with --all, single finished cycles will do)"
        raise ValueError(
            f"{config.home / 'chains'}: none of {len(plans)} chains asked for {lacking}. Run `python -m "
            "dmsae_ray.sweep` with this configuration; if that was done with fields on the command line, give "
            "--config the config.yaml in that sweep's results folder"
        )
    return saved


def expected_rate(saved: list[Saved]) -> float | None:
    """Tokens/s at which the sweep evaluated these, by their records; None if they do not say."""
    tokens = seconds = 0.0
    for sae in saved:
        record = sae.plan.folder.records()[sae.cycle]
        tokens += record.evaluation_tokens
        seconds += record.seconds["evaluate"]
    return tokens / seconds if tokens and seconds else None


class Evaluation:
    """One run of the command. The language model is loaded only where something has yet to be measured."""

    def __init__(self, config: Config, dataset: ActivationDataset, say: Screen):
        self.config, self.dataset, self.say = config, dataset, say
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lm: LanguageModel | None = None
        self.left = 1
        """SAEs not measured yet, the one in hand included"""

    @property
    def lm(self) -> LanguageModel:
        if self._lm is None:
            self._lm = LanguageModel.of(self.config.model, self.device)
        return self._lm

    def run(self, saved: list[Saved]) -> list[dict[str, Any]]:
        """What evaluation-<tokens>.json of each SAE holds, measured or known, in their order."""
        left = [sae for sae in saved if self.known(sae) is None]
        self.left = len(left)
        if left and (expected := expected_rate(left)):
            tokens = len(left) * self.config.evaluate.tokens
            self.say(
                f"evaluate: {len(left)} SAEs on {self.config.evaluate.tokens:,} tokens each; the sweep did "
                f"{expected:,.0f} tokens/s, at which it takes {duration(tokens / expected)}"
            )
        return [self.row(sae) for sae in saved]

    def row(self, saved: Saved) -> dict[str, Any]:
        """What is known of these very weights with these settings, or else is measured now.

        Raises ValueError naming the file if SAE or measurement is damaged.
        """
        if (row := self.known(saved)) is not None:
            self.say(f"evaluate: {saved.plan.label} cycle {saved.cycle}: known")
            return row
        row = self.identity(saved) | self.measured(saved)
        write_json(saved.folder.evaluation(self.config.evaluate.tokens), row)
        self.left -= 1
        self.say(
            f"evaluate: {saved.plan.label} cycle {saved.cycle}: {row['evaluation_tokens']:,} tokens in "
            f"{row['seconds']:.1f} s, {row['evaluation_tokens'] / row['seconds']:,.0f} tokens/s"
        )
        return row

    def known(self, saved: Saved) -> dict[str, Any] | None:
        """What was measured of these very weights with these settings before; None if it was not. Raises ValueError as
        `row`.
        """
        path = saved.folder.evaluation(self.config.evaluate.tokens)
        if not path.exists():
            return None
        try:
            row = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); delete it to have it measured again") from error
        return row if row.items() >= self.identity(saved).items() else None

    def identity(self, saved: Saved) -> dict[str, Any]:
        """What a measurement is of."""
        plan, path = saved.plan, saved.folder.sae
        if not present(path):
            raise ValueError(
                f"{path}: is gone; delete this cycle's folder and run `python -m dmsae_ray.sweep` to have it "
                "computed again"
            )
        return {
            "format_version": FORMAT_VERSION,
            "chain": plan.key,
            "label": plan.label,
            "arm": plan.arm,
            "stage": plan.stage,
            "seed": plan.seed,
            "k": plan.k,
            "cycle": saved.cycle,
            "sae": file_sha256(path),
            "evaluate": self.config.evaluate.model_dump(mode="json"),
        }

    def measured(self, saved: Saved) -> dict[str, Any]:
        """The metrics of record.json, on the tokens asked for."""
        evaluate, references, lm = self.config.evaluate, self.references(), self.lm
        began, manifest = time.monotonic(), self.dataset.manifest
        sae = MatryoshkaSAE.load(saved.folder.sae)[0].to(self.device)
        sequences = self.dataset.held_out("evaluation").first_tokens(evaluate.tokens)
        tally = Tally(len(sequences), torch.tensor(manifest.mean))
        batches = list(sequences.batches(evaluate.sequences_per_batch))
        said = began
        for done, (ids_NT, lengths_N) in enumerate(batches, 1):
            tally_batch(
                tally,
                sae,
                lm,
                ids_NT.to(self.device),
                lengths_N.to(self.device),
                manifest.scale,
                max_norm=manifest.max_norm,
                first=(done - 1) * evaluate.sequences_per_batch,
            )
            now = time.monotonic()
            # After the first batch, from which the rate is known, and then now and again.
            if done < len(batches) and (done == 1 or now - said >= SAY_SECONDS):
                said, share = now, done / len(batches)
                left = (now - began) / share * (self.left - share)
                self.say(
                    f"evaluate: {saved.plan.label} cycle {saved.cycle}: {share:.0%}, "
                    f"{share * evaluate.tokens / (now - began):,.0f} tokens/s, {duration(left)} left for {self.left} "
                    "SAEs"
                )
        metrics, _ = scores_of(tally, sae, references)
        return metrics | {"seconds": time.monotonic() - began, "device": self.device, "finished_at": time.time()}

    def references(self) -> dict[str, Any]:
        """Clean and ablated losses on these tokens; measured where they were not yet."""
        folder = self.config.home / "data" / self.dataset.manifest.key
        if not present(references_path(folder, self.config.evaluate)):
            self.say(f"evaluate: reference losses on {self.config.evaluate.tokens:,} tokens")
            write_references(
                folder, self.config.evaluate, references_of(self.lm, self.dataset, self.config.evaluate, self.device)
            )
        return read_references(folder, self.config.evaluate)

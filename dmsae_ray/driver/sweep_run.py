"""One run of the sweep, top to bottom: check, take the output folder, harvest, run the chains that are not finished,
compare all cores, log everything to MLflow, print the tables. What a previous run finished is never done again."""

from __future__ import annotations

import functools
import shlex
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from dmsae_ray.activations.catalogue import find_datasets
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.harvester import Harvest
from dmsae_ray.activations.outliers import notes
from dmsae_ray.cluster.capacity import Capacity
from dmsae_ray.cluster.held import HeldCluster
from dmsae_ray.cluster.metrics import tell_of_held_up_requests, tell_phases
from dmsae_ray.config import Config
from dmsae_ray.distill.grid import plan_chains, planned, read_more_often
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.driver.options import SweepCommand
from dmsae_ray.driver.preflight import check_needs, preflight, without_kernels
from dmsae_ray.driver.results import PAGE, Results, write_results
from dmsae_ray.driver.session import session
from dmsae_ray.driver.tracked import open_store, tracker_of
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.evaluation.loss_gradients import gradients_path
from dmsae_ray.evaluation.references import cycle_seconds, read_references, references_path
from dmsae_ray.files import discard, present, refresh, replacing, write_json
from dmsae_ray.identity import fields_key
from dmsae_ray.lock import Lease, Superseded
from dmsae_ray.ownership import scratch
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.show.terminal.console import terminal_console
from dmsae_ray.show.terminal.progress import PHASES, LiveLines, ProgressBoard, Status, duration
from dmsae_ray.show.tracking import Tracker, TrackingError
from dmsae_ray.store import StoreError


def run(command: SweepCommand) -> int:
    """The whole sweep. Raises ValueError on bad input before any work is lost."""
    config, verbose = preflight(Config(**command.sections()), print), command.verbose
    refresh(config.home)
    chains = check_needs(config)
    lacking = without_kernels(config)
    with session(config, "sweep", verbose) as (lock, say):
        arms = f"; {len(config.study.arms)} further arms, {len(chains)} chains in all" if config.study.arms else ""
        say(
            f"sweep {config.name}: {len(config.sweep.seeds)} seeds x {len(config.sweep.k)} k, cycles 0 to "
            f"{config.sweep.cycles - 1}{arms}"
        )
        if lacking:
            say(f"train: {lacking}; without compiled kernels a step takes several times longer")
        finished = Sweep(config, lock.lease(), say, verbose).run()
        finished.show(say)
        return 0 if finished.done else 1


@dataclass(frozen=True)
class Finished:
    """A sweep after its last chain."""

    config: Config
    dataset: ActivationDataset
    plans: list[ChainPlan]
    folder: Path
    results: Results
    store: SecretUrl
    """MLflow tracking URI"""
    compare: str | None
    """where its page compares the chains, behind the server's address"""
    untracked: str | None
    """why not all of it is in MLflow; None if it is"""

    @property
    def done(self) -> bool:
        """Whether every chain is finished and every part of the results was made."""
        return all(plan.finished() for plan in self.plans) and not self.results.failed and self.untracked is None

    def show(self, say: Screen) -> None:
        """The tables, and where everything is."""
        terminal_console(say.stream).print(self.results.tables)
        results = f"{self.config.place}/sweeps/{self.folder.name}"
        say(f"everything lies in {self.config.place}; this sweep's results in {results}")
        say(f"look at {self.folder / PAGE}; {look(self.config, self.store, self.compare)}")
        if self.untracked is not None:
            say(f"error: {self.untracked}")


class Sweep:
    """One run of the command, after its configuration was found good and the output folder is ours."""

    def __init__(self, config: Config, lease: Lease, say: Screen, verbose: bool):
        self.config, self.lease, self.say = config, lease, say
        logs = say.path.with_suffix(".ray")
        self.cluster = HeldCluster(config, lambda: self.unfinished, verbose, say, logs, when_there=self.tell)
        self.training = True

    def run(self, train: bool = True, fresh: bool = False) -> Finished:
        """The whole sweep; without `train`, only what is made of the chains that are finished, with `fresh` all of it
        anew.

        Raises TrackingError if the tracking store cannot be used, before any work; without `train` the results are made
        all the same.
        """
        self.training = train
        with self.cluster:
            if self.unfinished:
                self.cluster.reach()  # before hours of tokenising
            store = open_store(self.config)
            if train and isinstance(store, TrackingError):
                raise store
            dataset = self.dataset(harvest=train)
            plans = plan_chains(self.config, dataset)
            if line := read_more_often(plans, dataset):
                self.say(line)
            folder = sweep_folder(self.config, plans)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "config.yaml") as temporary:
                # Without `output`: read from here the file means the folder in which it lies, wherever that has been
                # moved to.
                tree = {name: section for name, section in self.config.section_dict().items() if name != "output"}
                temporary.write_text(yaml.safe_dump(tree, sort_keys=False))
            write_json(folder / "chains.json", [listed(plan) for plan in plans])
            if train:
                self.prepare(plans)
            tracker = tracker_of(self.config, sweep_key(plans), plans, dataset, store)
            try:
                tracker.sync()
                if train:
                    self.chains(plans, tracker)
                self.lease.check()
                results = write_results(self.config, dataset, plans, folder, self.say, self.cluster.connect, fresh)
                tracker.log_results(results.comparison, results.columns, results.means(), results.files)
            except Superseded:
                raise  # the runs are another driver's now
            except BaseException:
                # Whatever ended the sweep matters more than a store that cannot be reached on top of it.
                try:
                    tracker.close("KILLED")
                except TrackingError as error:
                    self.say(f"warning: {error}")
                raise
            finished = Finished(
                self.config, dataset, plans, folder, results, tracker.uri, tracker.page, tracker.why_not
            )
            try:
                tracker.close("FINISHED" if finished.done else "FAILED")
            except TrackingError as error:  # the tables are shown all the same
                return replace(finished, untracked=str(error))
            return finished

    @staticmethod
    def prepare(plans: list[ChainPlan]) -> None:
        """Make the chains' folders, and ready those of earlier runs to go on."""
        for plan in plans:
            plan.folder.describe(plan.key, plan.label, plan.fields)
            plan.folder.tidy()
            failure = plan.folder.failure()
            if failure is not None and not failure.final:
                discard(plan.folder.failed)  # bad data and lost machines are worth another try, divergence is not

    @functools.cached_property
    def unfinished(self) -> int:
        """Chains that are to be trained."""
        left = [plan for plan in planned(self.config) if not plan.finished()] if self.training else []
        failures = [plan.folder.failure() for plan in left]
        return sum(failure is None or not failure.final for failure in failures)

    def tell(self, capacity: Capacity) -> None:
        """Say what the cluster holds."""
        c, most = capacity, self.config.cluster.lockstep
        in_step = f" (or groups of up to {most} in lockstep)" if most > 1 else ""
        held = f" ({c.free_cpus:g} free; others hold the rest)" if c.free_cpus < c.cpus else ""
        waiting = ", those that wait for nodes of the autoscaler included" if c.grows else ""
        self.say(
            f"ray: {'started here' if c.local else 'joined'}, {c.cpus:g} logical CPUs{held}, {c.gpus:g} GPUs; "
            f"{c.concurrent} chains at once{in_step}{waiting}, each {self.config.cluster.workers} worker(s) with "
            f"{self.config.train.threads} thread(s)"
        )

    # -- harvest -------------------------------------------------------------------------------------------------------

    def dataset(self, harvest: bool) -> ActivationDataset:
        """The activations, their reference losses and the loss's gradients; Ray is started only if something is
        missing. Raises ValueError if there are none and none may be harvested."""
        hook = self.config.model.hook
        dataset = find_datasets(self.config, (hook,), self.say)[hook]
        if dataset is None and not harvest:
            raise ValueError(
                f"output folder {self.config.place}: has no finished dataset of this configuration; run python -m "
                "dmsae_ray.sweep first"
            )
        if dataset is None:
            self.cluster.reach()
            work = Harvest(self.config, self.say)
            dataset = work.run(self.cluster.connect().harvest_actors)[hook]
        else:
            self.say(f"harvest: {dataset} is complete and checked")
        for line in notes(dataset):
            self.say(line)
        folder = self.config.home / "data" / dataset.manifest.key
        if not present(references_path(folder, self.config.evaluate)):
            from dmsae_ray.evaluation.references import measure_references

            self.cluster.connect()
            measure_references(self.config, dataset, folder)
        if not present(gradients_path(folder, self.config)):
            from dmsae_ray.evaluation.loss_gradients import measure_gradients

            self.cluster.connect()
            measure_gradients(self.config, dataset, folder)
        return dataset

    # -- chains --------------------------------------------------------------------------------------------------------

    def chains(self, plans: list[ChainPlan], tracker: Tracker) -> None:
        """Run what is not finished, with live lines and MLflow kept up to date from the side.

        In waves: first what needs no other chain, then what needed those (placebos their twins' sizes, transfers their
        cores).
        """
        left = [plan for plan in plans if not plan.finished() and plan.folder.failure() is None]
        self.say(
            f"chains: {len(plans) - len(left)} of {len(plans)} already finished or failed"
            if len(left) < len(plans)
            else f"chains: {len(plans)} to run"
        )
        if not left:
            return
        self.say_what_a_cycle_takes(left[0])
        import ray

        from dmsae_ray.distill.failure import write_failure
        from dmsae_ray.distill.trials import run_chains

        at_once = self.cluster.at_once()
        tell_of_held_up_requests(self.config.name)
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressBoard).remote()
        for plan in left:
            ray.get(
                board.update.remote(plan.label, phase="queued", cycle=len(plan.folder.records()), cycles=plan.cycles)
            )

        def look() -> dict[str, Status]:
            statuses = ray.get(board.snapshot.remote())
            tell_phases(self.config.name, PHASES, [status.get("phase", "queued") for status in statuses.values()])
            return statuses

        def follow() -> None:
            with suppress(OSError, StoreError):  # a server that is away: what it has is looked at when it is back
                refresh(self.config.home / "chains")
            tracker.sync()

        with LiveLines(look, stream=self.say.stream), Every(10.0, follow):
            while wave := [plan for plan in left if all(chain.finished() for chain in plan.needs())]:
                run_chains(wave, self.lease, at_once, board, scratch(self.config.home, self.lease.generation))
                left = [plan for plan in left if plan not in wave]
            for plan in left:
                missing = [chain.label for chain in plan.needs() if not chain.finished()]
                write_failure(plan, self.lease, "error", f"not begun: it needs {' and '.join(missing)}, not finished")
                ray.get(board.update.remote(plan.label, phase="failed", message="what it needs failed"))

    def say_what_a_cycle_takes(self, plan: ChainPlan) -> None:
        """Known before the first chain begins, so that whoever asked for too much can lower it; the progress lines say
        what training takes, and each record keeps the seconds of its phases.
        """
        expected = cycle_seconds(self.config, read_references(plan.references, self.config.evaluate))
        if expected is not None:
            evaluation, attribution = (duration(seconds) for seconds in expected)
            self.say(
                f"a cycle, besides training: about {evaluation} of evaluation (evaluate.tokens "
                f"{self.config.evaluate.tokens:,}) and {attribution} of attribution (attribution.tokens "
                f"{self.config.attribution.tokens:,}) for one worker"
            )


def sweep_key(plans: list[ChainPlan]) -> str:
    chains = sorted([plan.arm, plan.key, plan.cycles] for plan in plans)
    return fields_key({"chains": chains, "compare": plans[0].config.compare.model_dump(mode="json")})


def sweep_folder(config: Config, plans: list[ChainPlan]) -> Path:
    """Where the results of these chains together lie."""
    return config.home / "sweeps" / f"{config.name}-{sweep_key(plans)}"


def listed(plan: ChainPlan) -> dict:
    """A chain as chains.json has it."""
    return {
        "label": plan.label,
        "key": plan.key,
        "arm": plan.arm,
        "stage": plan.stage,
        "seed": plan.seed,
        "k": plan.k,
        "cycles": plan.cycles,
    }


def look(config: Config, store: SecretUrl, compare: str | None) -> str:
    """How to look at the runs."""
    if store.reveal().startswith(("http:", "https:")):
        at = str(store).partition("?")[0].rstrip("/")
        return f"MLflow: {at}/{compare}" if compare else f"MLflow: {store} in a browser"
    ui = f"python -m dmsae_ray.ui --output {shlex.quote(str(config.output))}"
    return f"MLflow: {ui} (or make ui), or mlflow server --backend-store-uri {shlex.quote(str(store))}"


class Every:
    """Calls a function every so many seconds, in a thread, while its block runs."""

    def __init__(self, seconds: float, function):
        self.seconds, self.function, self._stop = seconds, function, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self.seconds):
            self.function()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

"""Where a run of the command is tracked, and what its tracker is told of its chains."""

from __future__ import annotations

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config
from dmsae_ray.distill.mapping import steps_of
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.show.mlflow.chain_runs import Data, TrackedChain
from dmsae_ray.show.mlflow.run_store import RunStore
from dmsae_ray.show.mlflow.tracker import MlflowTracker
from dmsae_ray.show.tracking import NotTracked, Tracker, TrackingError


def open_store(config: Config) -> RunStore | TrackingError:
    """Where the runs are logged, or why that cannot be opened: known before hours of work."""
    track = config.track
    try:
        return RunStore(track.uri, config.home, track.experiment)
    except TrackingError as error:
        return error


def tracker_of(
    config: Config, key: str, plans: list[ChainPlan], dataset: ActivationDataset, store: RunStore | TrackingError
) -> Tracker:
    """The tracker of a sweep's chains. key: the sweep's."""
    if isinstance(store, TrackingError):
        return NotTracked(config.track.uri, str(store))
    manifest = dataset.manifest
    data = Data(f"{manifest.model} {manifest.hook}", manifest.key, str(dataset.store), manifest.rows, manifest.d)
    return MlflowTracker(
        config.track.uri,
        config.home,
        config.track.experiment,
        key,
        config.name,
        config.section_dict(),
        [
            TrackedChain(
                plan.key,
                plan.label,
                plan.folder.path,
                plan.seed,
                plan.k,
                plan.cycles,
                plan.arm,
                plan.stage,
                plan.config.section_dict(),
                steps_of(plan.config),
                data,
            )
            for plan in plans
        ],
        store,
    )

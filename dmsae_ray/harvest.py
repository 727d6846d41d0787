"""python -m dmsae_ray.harvest: write the activation shards of a configuration, and stop."""

from __future__ import annotations

import signal
import sys

from dmsae_ray.activations.harvest import Harvest, find_dataset
from dmsae_ray.cluster import connect, disconnect
from dmsae_ray.config import Config, HarvestCommand, load
from dmsae_ray.lock import OutputBusy, OutputLock
from dmsae_ray.preflight import preflight
from dmsae_ray.screen import Screen
from dmsae_ray.sweep import INTERRUPTED, interrupt


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted (the same command continues)."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        command = load(HarvestCommand, sys.argv[1:] if argv is None else argv)
        return run(Config(**command.section_dict()), command.verbose)
    except (ValueError, OutputBusy) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished shards are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED


def run(config: Config, verbose: bool) -> int:
    preflight(config)
    lock = OutputLock(config.home)
    try:
        with Screen(config.home, "harvest", verbose) as say:
            dataset = find_dataset(config)
            if dataset is None:
                work = Harvest(config)
                capacity = connect(config, chains=1, verbose=verbose)
                try:
                    dataset = work.run(say, capacity.harvest_actors)
                finally:
                    disconnect(capacity, say.path.with_suffix(".ray"))
            manifest = dataset.manifest
            say(
                f"{dataset.folder}: {sum(s['rows'] for s in manifest.shards):,} training rows in {len(manifest.shards)} shards, "
                f"{manifest.calibration['rows']:,} held back, d = {manifest.d}, {manifest.dtype}, scale {manifest.scale:.6g}"
            )
    finally:
        lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())

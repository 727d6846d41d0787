"""python -m dmsae_ray.harvest: write the activation shards of a configuration, and stop. The work is in
driver/harvest_run.py.
"""

from __future__ import annotations

import sys

from dmsae_ray.driver.options import HarvestCommand
from dmsae_ray.driver.session import door


@door(HarvestCommand, interrupted="finished shards are kept, the same command continues")
def main(command: HarvestCommand) -> int:
    """Exit status: 0 done, 1 something is bad (--verify), 2 bad input, 130 interrupted (the same command continues)."""
    from dmsae_ray.driver.harvest_run import run

    return run(command)


if __name__ == "__main__":
    sys.exit(main())

"""python -m dmsae_ray.sweep: harvest, distil, compare, and say how far the cores agree. The work is in
driver/sweep_run.py.
"""

from __future__ import annotations

import sys

from dmsae_ray.driver.options import SweepCommand
from dmsae_ray.driver.session import door


@door(SweepCommand, interrupted="the same command continues where this one stopped")
def main(command: SweepCommand) -> int:
    """Exit status: 0 done, 1 some chains or parts of the results failed, 2 bad input, 130 interrupted (the same command
    continues).
    """
    if command.status:
        from dmsae_ray.driver.status import status

        return status(command)
    if command.clean:
        from dmsae_ray.driver.housekeeping import clean

        return clean(command, dry_run=command.dry_run)
    from dmsae_ray.driver.sweep_run import run

    return run(command)


if __name__ == "__main__":
    sys.exit(main())

"""python -m dmsae_ray.report: make all results of a sweep again from its chains' files, without training, and compare
two sweeps. The work is in driver/report_run.py."""

from __future__ import annotations

import sys

from dmsae_ray.driver.options import ReportCommand
from dmsae_ray.driver.session import door


@door(ReportCommand, interrupted="the same command continues")
def main(command: ReportCommand) -> int:
    """Exit status: 0 done, 1 some chains are not finished or a part of the results could not be made, 2 bad input, 130
    interrupted.
    """
    from dmsae_ray.driver.report_run import run

    return run(command)


if __name__ == "__main__":
    sys.exit(main())

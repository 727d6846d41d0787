"""python -m dmsae_ray.evaluate: measure saved SAEs on held-out text, without training. The work is in
driver/evaluation_run.py.
"""

from __future__ import annotations

import sys

from dmsae_ray.driver.options import EvaluateCommand
from dmsae_ray.driver.session import door


@door(EvaluateCommand, interrupted="what was measured is kept, the same command goes on")
def main(command: EvaluateCommand) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted (the same command goes on)."""
    from dmsae_ray.driver.evaluation_run import run

    return run(command)


if __name__ == "__main__":
    sys.exit(main())

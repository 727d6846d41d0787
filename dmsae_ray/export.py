"""python -m dmsae_ray.export: SAEs in other packages' formats, for use elsewhere. The work is in driver/export_run.py.

python -m dmsae_ray.export ~/dmsae_ray/quickstart --to saelens --out exported
python -m dmsae_ray.export ~/dmsae_ray/quickstart --chain seed0-k16 --to hub --out exported
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dmsae_ray.driver.session import ends_in_words


@ends_in_words(interrupted="what was written is whole; the same command writes it again")
def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m dmsae_ray.export",
        description=__doc__.partition(": ")[2].partition(" The work")[0] if __doc__ else None,
    )
    parser.add_argument(
        "place",
        help="a sweep's output folder, URL or results folder: its finished chains; or one SAE, ours or another's: a "
        "file, a folder, or owner/name:folder of the hub",
    )
    parser.add_argument("--to", required=True, choices=("saelens", "dictionary_learning", "hub"))
    parser.add_argument("--out", required=True, type=Path, help="folder for what is written, one in it for each chain")
    parser.add_argument("--chain", help="label of one chain, such as seed0-k16; left out: every finished one")
    parser.add_argument("--cycle", type=int, default=-1, help="counted from 0; left out: the last one")
    options = parser.parse_args(argv)

    from dmsae_ray.driver.export_run import run

    return run(options.place, options.to, options.out, options.chain, options.cycle)


if __name__ == "__main__":
    sys.exit(main())

"""python -m dmsae_ray.compare: which features several SAEs have in common, whoever trained them. The work is in
driver/compare_run.py.

    python -m dmsae_ray.compare saes/seed0 saes/seed1 saes/seed2 --data ~/dmsae_ray/quickstart/data/<key> --out compared
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dmsae_ray.driver.session import ends_in_words


@ends_in_words(interrupted="nothing was written")
def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m dmsae_ray.compare",
        description="Which features several SAEs have in common, whoever trained them: each pair beside what chance "
        "gives, and the features that several have. SAELens, dictionary_learning, sparsify, Gemma Scope, and ours.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="SAE",
        help="a file, a folder, or owner/name:folder of the hub; a sweep's output folder or URL means the last SAE of "
        "each of its finished chains",
    )
    parser.add_argument(
        "--data",
        help="activations to compare them on: a data set of python -m dmsae_ray.harvest (<output>/data/<key>, or a "
        "URL); left out: by their weights alone",
    )
    parser.add_argument("--rows", type=int, default=8192, help="rows of it (%(default)s); they are not trained on")
    parser.add_argument("--latents", type=int, default=8192, help="of each SAE at most (%(default)s)")
    parser.add_argument("--cosine", type=float, default=0.7, help="that shared latents reach (%(default)s)")
    parser.add_argument("--same-model", action="store_true", help="it is one model, though the SAEs name it otherwise")
    parser.add_argument("--out", type=Path, help="folder for compare.json, compare.txt and consensus.safetensors")
    options = parser.parse_args(argv)

    from dmsae_ray.driver.compare_run import run

    return run(
        options.places,
        options.data,
        options.rows,
        options.latents,
        options.cosine,
        options.out,
        same_model=options.same_model,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Seeds on documents of their own, through the front door."""

from __future__ import annotations

import json

import pytest
from conftest import Sweep, run_command

from dmsae_ray.activations.dataset import ActivationDataset

DISJOINT = ("--sweep.data", "disjoint", "--train.tokens", "4096")


@pytest.mark.slow
def test_a_seed_reads_the_same_rows_of_its_own_documents_with_one_worker_and_with_two(tmp_path):
    digests, shards = [], []
    for number in ("1", "2"):
        output = tmp_path / number / "out"
        run = run_command(output, *DISJOINT, "--cluster.workers", number, "--harvest.actors", number)
        assert run.code == 0 and "documents dealt to 2 parts" in run.out, run.out
        (folder,) = (path.parent for path in output.glob("data/*/manifest.json"))
        dataset = ActivationDataset(folder)
        shards.append({entry.file: (folder / entry.file).read_bytes() for entry in dataset.entries()})
        chains = Sweep(output, run, output).chains()
        records = {
            label: json.loads((chain / "cycle_00/record.json").read_text()) for label, chain in sorted(chains.items())
        }
        assert list(records) == ["seed0-k8", "seed1-k8"]
        digests.append([record["data_digest"] for record in records.values()])
        # Its core is chosen on held-out text of its own: so many tokens have no other of these splits.
        scored = [record["attribution"]["tokens"] for record in records.values()]
        there = {
            split: dataset.held_out(split).first_tokens(2048).tokens
            for split in ("attribution-0", "attribution-1", "attribution")
        }
        assert len(set(there.values())) == 3 and scored == [there["attribution-0"], there["attribution-1"]]
    assert shards[0] == shards[1] and len(shards[0]) == 3
    assert digests[0] == digests[1] and digests[0][0] != digests[0][1]

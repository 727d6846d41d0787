"""What a killed writer leaves, and who removes it."""

import json

from records import cycle_record

from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.files import leftovers


def test_tidying_a_chain_drops_temporary_files_and_what_a_finished_cycle_does_not_need(tmp_path):
    chain = ChainFolder(tmp_path)
    left = [
        "checkpoint.pt.tmp-17-0f3a9c",
        "sae.safetensors.tmp-17-0f3a9d",
        "attribution/ab-00001.safetensors.tmp-18-0f3a9c",
    ]
    for cycle in (0, 1):
        folder = chain.cycle(cycle)
        folder.attribution.mkdir(parents=True)
        for name in ["checkpoint.pt", "curve.jsonl", "sae.safetensors", "attribution/ab-00000.safetensors", *left]:
            (folder.path / name).write_text(name)
    # Killed between its record and the removal of what it no longer needs.
    chain.cycle(0).record.write_text(json.dumps(cycle_record()))
    assert len(leftovers(tmp_path)) == 2 * len(left)
    chain.tidy()
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == [
        "cycle_00/curve.jsonl",
        "cycle_00/record.json",
        "cycle_00/sae.safetensors",
        "cycle_01/attribution/ab-00000.safetensors",
        "cycle_01/checkpoint.pt",
        "cycle_01/curve.jsonl",
        "cycle_01/sae.safetensors",
    ]

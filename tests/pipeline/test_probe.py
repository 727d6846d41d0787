"""jobs/probe on a finished sweep, with labels whose cause is known."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch

import dmsae_ray
from dmsae_ray.lm.model import LanguageModel

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs" / "probe"))
import run as probe
from probe_sets import chains_of

TEXTS = 240


def some_texts():
    path = Path(dmsae_ray.__file__).parent / "corpus" / "embedded" / "documents.parquet"
    documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return list(dict.fromkeys(" ".join(one.split()[4:16]) for one in documents))[:TEXTS]


def write(path, texts, labels):
    rows = [f'"{text.replace(chr(34), "")}",{int(label)}' for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["text,label", *rows]))


def test_what_a_core_latent_decides_its_probe_finds_and_what_nothing_decides_no_probe_finds(small_sweep, tmp_path):
    sweep = dmsae_ray.load_sweep(small_sweep.output)
    texts = [text.replace('"', "") for text in some_texts()]
    chains = chains_of(sweep, "base", 8, draws=2, seed=0, device="cpu")
    lm = LanguageModel.of(sweep.config.model, "cpu")
    _, found = probe.pooled(lm, texts, chains, sweep.config.model.context, sweep.dataset().manifest.max_norm, "max")
    (source, columns) = chains[0].sets["core"][0]
    fires_NC = found[0][source][:, columns] > 0
    # By hand, one text at a time: what its tokens' largest activation is.
    ids = [lm.bos_id, *lm.tokenizer(texts[0], add_special_tokens=False)["input_ids"]]
    x_TD = lm.cut(torch.tensor([ids])).value_BTD[0, 1:]
    z_TC = chains[0].sources[source].latents.encode(x_TD / chains[0].sources[source].scale)[:, columns]
    np.testing.assert_allclose(found[0][source][0, columns], z_TC.max(dim=0).values, rtol=1e-4, atol=1e-5)

    share_C = fires_NC.mean(axis=0)
    chosen = int(np.abs(share_C - 0.5).argmin())
    assert 0.1 < share_C[chosen] < 0.9
    write(tmp_path / "planted.csv", texts, fires_NC[:, chosen])
    write(tmp_path / "nothing.csv", texts, [zlib.crc32(text.encode()) & 1 for text in texts])
    out = tmp_path / "out"
    argv = ["--data", str(tmp_path), "--pool", "max", "--sparse", "1", "--draws", "2", "--output", str(out)]
    assert probe.main(["--sweep", str(small_sweep.output), *argv]) == 0

    result = json.loads((out / "probe.json").read_text())
    names = [one["name"] for one in result["data"]]
    auc = {
        (entry["kind"], entry["k"], name): np.array(entry["auc"], dtype=float)[:, names.index(name)]
        for entry in result["values"]
        for name in names
    }
    assert auc["core", 1, "planted"][0] == 1 and auc["core", None, "planted"][0] > 0.98
    assert auc["random", 1, "planted"][0] < 0.95 and auc["density", 1, "planted"][0] < 0.95
    for kind in ("core", "random", "density", "norm"):
        assert np.abs(auc[kind, None, "nothing"] - 0.5).max() < 0.2, kind
    assert {entry["kind"] for entry in result["results"]} >= {"residual", "core", "density", "norm", "random"}
    said = (out / "probe.md").read_text()
    assert "| core | all | 2 |" in said and "| random | 1 | 2 |" in said


def test_a_sweep_without_such_chains_is_named(small_sweep, tmp_path, capsys):
    write(tmp_path / "a.csv", [f"text {i}" for i in range(60)], [i % 2 for i in range(60)])
    assert probe.main(["--sweep", str(small_sweep.output), "--data", str(tmp_path), "--arm", "norm"]) == 2
    assert "no finished chain of arm norm with k 8; there are base k 8" in capsys.readouterr().err

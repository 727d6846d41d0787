"""What is read from a disk, a bucket or the hub is data, never a program: read from the syntax trees of the package and
the jobs, for whatever would run what a file holds. What libraries do by themselves is tried with real files below.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dmsae_ray
from dmsae_ray.corpus.file_rows import file_rows
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.source import TINY, load_config, load_tokenizer

ROOT = Path(dmsae_ray.__file__).parents[1]
FILES = sorted(path for folder in ("dmsae_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))

PICKLES = "pickle _pickle cPickle cloudpickle ray.cloudpickle dill joblib marshal shelve jsonpickle".split()
RUN = {
    *(f"{module}.{name}" for module in PICKLES for name in ("load", "loads", "open", "Unpickler", "decode")),
    *"pandas.read_pickle torch.jit.load torch.package.PackageImporter torch.hub.load".split(),
    *"yaml.unsafe_load yaml.unsafe_load_all yaml.full_load yaml.full_load_all yaml.load_all".split(),
    *"mlflow.pyfunc.load_model mlflow.pytorch.load_model mlflow.sklearn.load_model".split(),
    *"eval exec compile __import__ builtins.eval builtins.exec os.system os.popen subprocess.getoutput".split(),
    *"runpy.run_path runpy.run_module importlib.util.spec_from_file_location".split(),
}
"""What runs, or may run, what it is given."""
WITH = {
    "torch.load": ("weights_only", True),
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
}
"""What does so unless it is told not to: by its whole name, or as a method of whatever."""
NEVER = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True, "shell": False}
"""Options that no call may give another value."""
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")


def names_of(tree: ast.AST) -> dict[str, str]:
    """What each imported name is, whole."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                found[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def whole(node: ast.expr, names: dict[str, str]) -> str:
    """The whole name of what an expression refers to; empty if it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{whole(node.value, names)}.{node.attr}"
    return ""


def runs_what_it_reads(text: str) -> Iterator[str]:
    """Every place in a program that would run what it reads."""
    tree = ast.parse(text)
    names = names_of(tree)
    safe = {*SAFE_LOADERS}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(whole(base, names) in SAFE_LOADERS for base in node.bases):
            safe.add(node.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and whole(node, names) in RUN:
            yield f"line {node.lineno}: {whole(node, names)}"
        if not isinstance(node, ast.Call):
            continue
        called = whole(node.func, names)
        given = {one.arg: one.value for one in node.keywords}
        for name, (option, value) in WITH.items():
            if called == name or ("." not in name and called.endswith(f".{name}")):
                told = given.get(option)
                if not (isinstance(told, ast.Constant) and told.value is value):
                    yield f"line {node.lineno}: {called} without {option}={value}"
        for option, value in NEVER.items():
            if option in given and not (isinstance(given[option], ast.Constant) and given[option].value is value):
                yield f"line {node.lineno}: {option} is not {value}"
        if called == "yaml.load":
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or whole(loader, names) not in safe:
                yield f"line {node.lineno}: yaml.load without a safe loader"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    assert list(runs_what_it_reads(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.load(file)",
        "import pickle as p\np.Unpickler(file)",
        "from pickle import loads as harmless\nharmless(b'')",
        "from ray import cloudpickle\ncloudpickle.loads(b'')",
        "import ray\nray.cloudpickle.loads(b'')",
        "import joblib\nmap(joblib.load, files)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nclass Mine(yaml.Loader): pass\nyaml.load(text, Loader=Mine)",
        "import yaml\nyaml.unsafe_load(text)",
        "import pandas as pd\npd.read_pickle(path)",
        "import mlflow\nmlflow.pyfunc.load_model(uri)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name, trust_remote_code=True)",
        "import datasets\ndatasets.load_dataset(name, trust_remote_code=True)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_what_would_run_it_is_found(text):
    assert list(runs_what_it_reads(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import yaml\nclass Mine(yaml.SafeLoader): pass\nyaml.load(text, Loader=Mine)",
        "import yaml\nyaml.safe_load(text)",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import numpy as np\nnp.load(path)",
        "model.eval()",
        "import re\nre.compile(text)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_what_only_reads_is_left_alone(text):
    assert not list(runs_what_it_reads(text))


class Runs:
    """Pickled, it makes a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_this_file_would_run(tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture
def model(tmp_path) -> Path:
    """The shipped model, in a folder that a test may write to."""
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.mark.parametrize(
    "read", [load_config, load_tokenizer, lambda name: LanguageModel.load(name, "blocks.0.hook_resid_pre")]
)
def test_a_model_s_own_program_is_not_run(model, read):
    """Nor is anybody asked whether it may be."""
    (model / "theirs.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    for name, classes in {
        "config.json": {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"},
        "tokenizer_config.json": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]},
    }.items():
        tree = json.loads((model / name).read_text())
        tree |= {"model_type": "theirs"} if name == "config.json" else {"tokenizer_class": "Theirs"}
        (model / name).write_text(json.dumps(tree | {"auto_map": classes}))
    with pytest.raises(ValueError, match=rf"model\.name {model}: its .* programs are never run here"):
        read(str(model))
    assert not (model / "ran").exists()


def test_pickled_weights_are_not_run(model):
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Runs(model / "ran")}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match="its weights are pickled .* safetensors"):
        LanguageModel.load(str(model), "blocks.0.hook_resid_pre")
    assert not (model / "ran").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_objects_in_a_text_file_are_not_run(tmp_path, nested):
    """Ray Data has a column of them, which pyarrow unpickles in every process that has imported Ray Data."""
    import ray.data  # noqa: F401
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    column = ArrowPythonObjectArray.from_objects([Runs(tmp_path / "ran")])
    if nested:  # as a part of a chat message
        struct = pa.StructArray.from_arrays([pa.array(["user"]), column], ["role", "content"])
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), struct)
    pq.write_table(pa.table({"text": column}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: field 'text' holds .*, not text"):
        list(file_rows(tmp_path / "text.parquet", "text"))
    assert not (tmp_path / "ran").exists()

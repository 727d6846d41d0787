"""A core as a model in MLflow: logged once for each run, registered by name, and found again by its address.

    models:/<name>@<alias>   models:/<name>/<version>   models:/<model id>   runs:/<run id>/core

`mlflow.pyfunc.load_model` of any of them gives a model whose predict takes raw rows [R, D] and gives the core's
activations [R, C]; this module is its loader. Letters: R rows, D model dimension, C core size.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dmsae_ray.core.core import Core
from dmsae_ray.sae.sae import active
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.show.mlflow.own_database import database_of, default_uri
from dmsae_ray.show.mlflow.run_store import STORE_ERRORS, RunStore, one_line

if TYPE_CHECKING:  # MLflow is imported when run_store has told it how
    from mlflow.tracking import MlflowClient

FILE = "core.safetensors"
ALIAS = "current"
"""The consensus that was registered last."""


class CoreModel:
    """What MLflow's python_function model calls."""

    def __init__(self, core: Core):
        self.core = core

    def predict(self, rows_RD: np.ndarray, params: dict | None = None) -> np.ndarray:
        """Activations [R, C], fp32, beyond the threshold of the SAE in which it was selected. rows_RD: raw units."""
        core = self.core
        x_RD = torch.as_tensor(np.asarray(rows_RD), dtype=torch.float32) / core.scale
        z_RC = torch.nn.functional.linear(x_RD - core.b_dec_D, core.W_enc_CD, core.b_enc_C)
        return active(z_RC, torch.tensor(core.theta)).numpy()


def _load_pyfunc(path: str) -> CoreModel:
    """MLflow's hook. path: of the core's file."""
    return CoreModel(Core.load(path))


def log_core(store: RunStore, run_id: str, core: Core, name: str, tags: dict[str, str], step: int) -> str:
    """Id of a run's model of this core; it is logged unless the run has it. What was cut short is gone on with: the run
    may name it already.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    client, tags = store.client, tags | {"dmsae.core": core.fingerprint}
    begun, named = None, set()
    if not store.made_here(run_id):
        mine = f"source_run_id = '{run_id}'"
        for model in client.search_logged_models([store.experiment_id], filter_string=mine):
            if model.tags.get("dmsae.core") == core.fingerprint:
                if model.status == LoggedModelStatus.READY:
                    return model.model_id
                begun = model.model_id
        if (outputs := client.get_run(run_id).outputs) is not None:
            named = {output.model_id for output in outputs.model_outputs}
    if begun is None:
        params = {"size": str(core.size), "d": str(core.W_enc_CD.shape[1]), "hook": core.hook, "cycle": str(core.cycle)}
        begun = client.create_logged_model(store.experiment_id, name, run_id, tags, params, "core").model_id
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), core, begun, run_id)
        client.log_model_artifacts(begun, folder)
    if begun not in named:
        client.log_outputs(run_id, [LoggedModelOutput(begun, step)])
    client.finalize_logged_model(begun, LoggedModelStatus.READY)
    return begun


def _write_model(folder: Path, core: Core, model_id: str, run_id: str) -> None:
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    size, d = core.W_enc_CD.shape
    rows, latents = (Schema([TensorSpec(np.dtype("float32"), (-1, n), name)]) for n, name in ((d, None), (size, None)))
    loader = {"loader_module": __name__, "data": FILE}
    model = Model(
        run_id=run_id,
        model_id=model_id,
        signature=ModelSignature(rows, latents),
        flavors={"python_function": loader},
    )
    core.save(folder / FILE)
    model.save(folder / "MLmodel")


def register(store: RunStore, name: str, model_id: str, run_id: str, core: Core) -> None:
    """Make a model the version of this name that ALIAS means; one that is registered is not registered again."""
    from mlflow.exceptions import MlflowException

    client, mark = store.client, {"dmsae.home": store.home, "dmsae.core": core.fingerprint}
    try:
        client.create_registered_model(name, description="Features that the seeds of a sweep agree on, as one core.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    same = [v for v in client.search_model_versions(f"name = '{name}'") if mark.items() <= v.tags.items()]
    version = same[0] if same else None
    if version is None:
        # The place itself: MLflow would look its address up in the process's store instead of this one.
        place = client.get_logged_model(model_id).artifact_location
        version = client.create_model_version(name, place, run_id, mark, model_id=model_id)
    client.set_registered_model_alias(name, ALIAS, version.version)


def fetch_core(address: str, store: str | Path | None) -> Core:
    """The core at an address in a store. store: tracking URI, or an output folder; None: $MLFLOW_TRACKING_URI.

    Raises ValueError that names the address if no store is given, it cannot be reached, or has no core there.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    given = store or os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        raise ValueError(
            f"{address}: lies in an MLflow store; give store= a sweep's output folder or a tracking URI, or set "
            "MLFLOW_TRACKING_URI"
        )
    uri = str(given)
    if ":" not in uri.partition("/")[0]:
        output = Path(uri).expanduser()
        uri = default_uri(output)
        if not database_of(output).exists():
            raise ValueError(f"{address}: {output} has no mlflow.db; give store= a sweep's output folder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = _place_of(MlflowClient(tracking_uri=uri, registry_uri=uri), address)
            found = Path(download_artifacts(place, dst_path=folder, tracking_uri=uri))
        except STORE_ERRORS as error:
            raise ValueError(f"{address}: not found in {SecretUrl(uri)} ({one_line(error)})") from error
        return Core.load(found / FILE if found.is_dir() else found)


def _place_of(client: MlflowClient, address: str) -> str:
    """Where the artifacts of an address lie. MLflow would look some of them up in the process's store."""
    kind, _, rest = address.partition(":/")
    name, _, end = rest.strip("/").partition("/")
    if kind == "runs":
        outputs = client.get_run(name).outputs
        models = [client.get_logged_model(model.model_id) for model in (outputs.model_outputs if outputs else [])]
        return next((model.artifact_location for model in models if model.name == end), address)
    if end:
        version = client.get_model_version(name, end)
    elif "@" in name:
        version = client.get_model_version_by_alias(*name.rsplit("@", 1))
    else:
        return client.get_logged_model(name).artifact_location
    return client.get_model_version_download_uri(version.name, version.version)

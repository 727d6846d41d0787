"""python -m dmsae_ray.ui: open MLflow on a sweep's results (what `make ui` runs)."""

from __future__ import annotations

import os
import sys

from dmsae_ray.command import HarvestCommand, load
from dmsae_ray.config import Config


def main(argv: list[str] | None = None) -> int:
    """Replaces this process by MLflow's server on the configuration's store; stop it with Ctrl-C."""
    try:
        config: Config = load(HarvestCommand, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if config.track.uri is not None:
        print(f"this configuration logs to {config.track.uri}: open that server's address in a browser")
        return 0
    database = config.home / "mlflow.db"
    if not database.exists():
        print(f"error: {database}: nothing logged yet; run python -m dmsae_ray.sweep first", file=sys.stderr)
        return 2
    port = os.environ.get("MLFLOW_PORT", "5000")
    print(f"MLflow: http://127.0.0.1:{port} (experiment {config.track.experiment})", flush=True)
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}", "--host", "127.0.0.1", "--port", port],
    )


if __name__ == "__main__":
    sys.exit(main())

"""MLflow: a run for each chain, cycle and sweep, written from the folders on disk."""

"""What a sweep shows: MLflow runs, live lines, tables and figures, all read from the folders on disk."""

"""A chain of cycles that distils a core: training, attribution, selection."""

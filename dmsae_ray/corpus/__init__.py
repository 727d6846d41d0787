"""Text: documents, their splits, and token sequences on disk."""

"""SAEs of other packages, read without them, and ours in their formats."""

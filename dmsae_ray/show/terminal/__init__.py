"""The terminal: live lines of progress, and tables."""

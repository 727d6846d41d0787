"""What a finished sweep says about its features. No Ray."""

"""What the commands are made of: options, the session around a run, checks before it, and the steps of each."""

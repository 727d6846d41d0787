"""What each feature of the cores is: where it fires, in which text, and what it does to the loss."""

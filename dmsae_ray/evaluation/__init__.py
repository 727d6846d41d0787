"""How good an SAE is on held-out text: reconstruction, the model's loss through it, and what both are compared with."""

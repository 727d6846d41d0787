"""The operations of a step on pairs of a row and a latent: in plain torch, compiled for the CPU, and in Triton."""

"""A core: the latents that one cycle hands to the next; how candidates are ranked and chosen, and how it drifts."""

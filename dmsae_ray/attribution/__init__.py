"""What each latent does to the loss: gradients, histograms and sums over shards, and the actor that gathers them."""

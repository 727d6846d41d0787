"""One Matryoshka sparse autoencoder with a frozen core: parameters, gate, loss, training step, threshold. Knows no
Ray.
"""

"""Distilled Matryoshka sparse autoencoders on Ray: which features of a language model are really there."""

__version__ = "0.1.0"

"""Eq. 1 to 3 of the paper as pure functions of embeddings."""

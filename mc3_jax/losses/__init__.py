"""Losses as pure functions: Eq. 1 to 3 of the paper, and those of the methods it is compared with."""

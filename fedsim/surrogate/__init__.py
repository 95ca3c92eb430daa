"""Gaussian processes over a client's queries, their gradients, and random features that compress them."""

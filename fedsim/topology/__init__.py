"""Graphs, gossip rates, mixing matrices and their spectral quantities (see `build`, `rates`, `mixing`)."""

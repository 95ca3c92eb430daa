"""Quantisers and sparsifiers with exact wire codecs: what is charged is the length of what would travel."""

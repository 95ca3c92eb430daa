"""Differential privacy: what is promised (`section`), what it costs (`gaussian`, `sampled`, `ledger`), how it is kept.

Neighbouring relations, sensitivities and their proofs follow Murata & Suzuki, *DIFF2*, ICML 2023 (arXiv 2302.03884),
with exact Gaussian accounting instead of the paper's closed form.
"""

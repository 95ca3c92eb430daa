"""Balancing a mixture of experts: selection, rules, the exact assignment, score streams, metrics, the layer."""

"""fedsim: decentralized and federated optimization; one scenario on every engine."""

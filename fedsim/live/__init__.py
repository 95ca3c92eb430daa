"""Real clocks: gradients as fast as ranks compute them, gossip by ordered offers, a trace that replays to the bit."""

"""The networks: flax modules, and what a layer of theirs computes."""

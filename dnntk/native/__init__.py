"""The CPU library: all layers of a network in one call of C++."""

"""The empirical neural tangent kernel, of deep narrow networks and of any other."""

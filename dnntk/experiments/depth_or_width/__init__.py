"""Depth or width: deep narrow networks beside wide shallow ones."""

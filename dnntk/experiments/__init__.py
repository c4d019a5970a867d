"""One module per experiment: a function from its configuration to its results and files."""

"""One module an experiment: a pure function of its configuration, and what it leaves behind."""

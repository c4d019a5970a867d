"""Deep narrow networks as scikit-learn estimators, and the files that hold them."""

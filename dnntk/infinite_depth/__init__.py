"""The infinitely deep network: kernel gradient flow, its estimators and predictions."""

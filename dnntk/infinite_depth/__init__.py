"""The infinitely deep network: kernel gradient flow and predictions."""

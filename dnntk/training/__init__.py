"""Training a network: configuration, step size, gradient flow, evaluation."""

"""How a network's kernel changed in training: how far it moved, and whether towards the labels."""

import numpy as np

__all__ = ["alignment", "movement"]


def movement(before: np.ndarray, after: np.ndarray) -> float:
    """||Theta_t - Theta_0||_F / ||Theta_0||_F of two kernels of one shape; 0 in the lazy regime."""
    before, after = (np.asarray(a, np.float64) for a in (before, after))
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def alignment(kernel: np.ndarray, y: np.ndarray) -> float:
    """Centred kernel-target alignment (Cortes, Mohri & Rostamizadeh 2012, definition 4).

    <K_c, T_c>_F / (||K_c||_F ||T_c||_F), with K_c = H K H, H = I - 1 1^T / n, and T = y y^T.

    Args:
        kernel: [n, n]; or [n, n, k, k] over outputs, replaced by its trace over k.
        y: [n, k], targets.

    Returns:
        1 if the kernel equals T up to a factor and an added constant; at least 0 for a positive
        semidefinite kernel. NaN if the kernel or T is constant.
    """
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim == 4:
        kernel = np.einsum("nmkk->nm", kernel)
    centred, target = _centred(kernel), _centred(np.asarray(y, np.float64) @ y.T)
    sizes = np.linalg.norm(centred) * np.linalg.norm(target)
    return float(np.sum(centred * target) / sizes) if sizes > 0 else float("nan")


def _centred(matrix: np.ndarray) -> np.ndarray:
    rows = matrix - matrix.mean(axis=0, keepdims=True)
    return rows - rows.mean(axis=1, keepdims=True)

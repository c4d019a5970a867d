"""The infinitely deep network as scikit-learn estimators.

`InfiniteDepthClassifier` and `InfiniteDepthRegressor` predict as an infinitely deep narrow network
does at time t of its training (Theorems 3.3 and 4.3). No network is trained: each is a kernel
machine with `limit_ntk`. Use them beside other estimators, in pipelines and searches; use
`dnntk.KernelFlow`, on which they are built, for many times of one flow or for other kernels.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets

from dnntk.checks import native_numbers
from dnntk.errors import InputError
from dnntk.estimators.base import CheckedScore, InfiniteDepth

__all__ = ["InfiniteDepthClassifier", "InfiniteDepthRegressor"]

_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_LABELS = ("str", "object", "bool", "float16", "float32", "float64", *_INTEGERS)


class InfiniteDepthClassifier(CheckedScore, ClassifierMixin, InfiniteDepth):
    """Classification by the infinitely deep narrow network at a time of its training.

    The loss is least squares, as in the thesis: on one output with the targets 0 and 1 for two
    classes, with the threshold 1/2, and on one-hot targets for more classes. The outputs are not
    probabilities.

    Time is of order n^3 in the number of training examples, beyond 4,096 of n^2 an iteration;
    prediction takes n evaluations of the kernel a point. Everything is float64.

    Attributes:
        classes_: the labels, sorted.
        n_features_in_: features seen in `fit`.
        feature_names_in_: [n_features_in_], where X had names that are all strings.
        kernel_: the `LimitKernel` that was fitted.
        x_train_: [n, n_features_in_] float64.
        coefficients_: [n, d_out] float64: f_t(x) = kernel_(x, x_train_) coefficients_.
        converged_: is the residual within the tolerance?
        residual_: relative residual of the flow's differential equation, rounding included.
        n_iter_: products with the Gram matrix; 0 for an eigendecomposition.
        condition_: effective condition of the problem; see
            `dnntk.infinite_depth.kernel_flow.Solution`.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Solve the kernel gradient flow.

        Args:
            X: [n, n_features], finite; best of size about 1.
            y: [n] labels of any type, of two classes or more.

        Returns:
            The estimator itself.

        Raises:
            InputError: a parameter has the wrong type or range; one class only; time is infinite,
                there is no ridge, and the Gram matrix is singular.
            ValueError: scikit-learn's, for X and y.
        """
        x, labels = self._validated(X, y)
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"y: expected two classes or more, got one class, {classes[0]!r}")
        targets = codes[:, None].astype(np.float64)
        if len(classes) > 2:
            targets = np.eye(len(classes))[codes]
        self._solve(x, targets)
        self.classes_ = classes
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """The evidence for each class.

        Args:
            X: [n, n_features].

        Returns:
            For two classes [n], the output - 1/2, positive for ``classes_[1]``; for more classes
            [n, n_classes], the outputs: the largest is the prediction. float64.
        """
        outputs = self._outputs(X)
        return outputs[:, 0] - 0.5 if outputs.shape[1] == 1 else outputs

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The labels [n] of X [n, n_features]."""
        decision = self.decision_function(X)
        codes = (decision > 0).astype(int) if decision.ndim == 1 else decision.argmax(1)
        return self.classes_[codes]

    def _targets_described(self) -> dict[str, Any]:
        kind = "str" if self.classes_.dtype.kind in "UT" else self.classes_.dtype.name
        labels = self.classes_.tolist()
        plain = type(labels[0]) in (str, bool, int, float) and kind in _LABELS
        if not plain or any(type(label) is not type(labels[0]) for label in labels):
            raise InputError(
                "y: expected labels that are strings, numbers or bools to save them, got "
                f"{labels[0]!r:.40}; turn them into strings before fit"
            )
        return {"labels": labels, "labels_type": kind}

    def _restore_targets(self, about: dict[str, Any]) -> None:
        kind, labels = about["labels_type"], about["labels"]
        if kind not in _LABELS:
            raise ValueError("labels of an unknown type")
        if type(labels) is not list or type(labels[0]) not in (str, bool, int, float):
            raise ValueError("no list of labels")
        classes = np.array(labels, kind)
        outputs = self.coefficients_.shape[1]
        different = len(np.unique(classes)) == len(classes) > 1
        if classes.ndim != 1 or not different or classes.tolist() != labels:
            raise ValueError("labels that are not different values of one type")
        if outputs != (1 if len(classes) == 2 else len(classes)):
            raise ValueError("another number of classes than of outputs")
        self.classes_ = classes


class InfiniteDepthRegressor(CheckedScore, RegressorMixin, InfiniteDepth):
    """Regression by the infinitely deep narrow network at a time of its training.

    Targets are not scaled or centred: the network starts at 0, predictions are linear in y, and the
    mean of y is learnt early. Several outputs belong to one network: the constant part of its
    kernel is d_out; apart from this constant, every output is fitted independently.

    Time is of order n^3 in the number of training examples, beyond 4,096 of n^2 an iteration;
    prediction takes n evaluations of the kernel a point. Everything is float64.

    Attributes: those of `InfiniteDepthClassifier` without ``classes_``.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Solve the kernel gradient flow.

        Args:
            X: [n, n_features], finite; best of size about 1.
            y: [n] or [n, d_out], finite.

        Returns:
            The estimator itself.

        Raises:
            InputError: a parameter has the wrong type or range; time is infinite, there is no
                ridge, and the Gram matrix is singular.
            ValueError: scikit-learn's, for X and y.
        """
        # scikit-learn itself refuses None and complex numbers; its tests expect its own messages.
        if y is not None and getattr(getattr(y, "dtype", None), "kind", "") != "c":
            y = native_numbers("y", y).astype(np.float64)
        x, targets = self._validated(X, y, multi_output=True, y_numeric=True)
        self._solve(x, targets.reshape(len(targets), -1))
        self._flat = targets.ndim == 1
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The outputs at X [n, n_features]: [n], or [n, d_out] if y had two axes. float64."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs

    def __sklearn_tags__(self) -> Tags:
        """scikit-learn's tags of a regressor with several outputs."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _targets_described(self) -> dict[str, Any]:
        return {"flat": self._flat}

    def _restore_targets(self, about: dict[str, Any]) -> None:
        if type(about["flat"]) is not bool or about["flat"] and self.coefficients_.shape[1] > 1:
            raise ValueError("several outputs in one column")
        self._flat = about["flat"]

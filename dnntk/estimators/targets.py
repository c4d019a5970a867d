"""What an estimator's outputs mean: classes or numbers.

`NarrowClassifier` and `NarrowRegressor` are the halves of an estimator that do not depend on the
network: targets of the fit, predictions of the outputs, scores.
"""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets

from dnntk.checks import check_unmasked, native_numbers
from dnntk.errors import InputError
from dnntk.estimators.base import NarrowEstimator

__all__ = ["NarrowClassifier", "NarrowRegressor"]

_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_LABELS = ("str", "object", "bool", "float16", "float32", "float64", *_INTEGERS)


class _CheckedScore:
    """scikit-learn's ``score`` (accuracy or R^2), which refuses masked entries."""

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """The accuracy of a classifier; the coefficient of determination R^2 of a regressor.

        Raises:
            InputError: an entry is masked.
        """
        check_unmasked("y", y)
        check_unmasked("sample_weight", sample_weight)
        return float(super().score(X, y, sample_weight))  # type: ignore[misc]


class NarrowClassifier(_CheckedScore, ClassifierMixin, NarrowEstimator):
    """Classes as outputs: 0 and 1 of one output for two classes, one-hot for more."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the network at the kernel time ``time``.

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
        self._fit_outputs(x, targets)
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
        outputs = self._outputs_at(X)
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
        different = len(np.unique(classes)) == len(classes) > 1
        if classes.ndim != 1 or not different or classes.tolist() != labels:
            raise ValueError("labels that are not different values of one type")
        if self._output_count() != (1 if len(classes) == 2 else len(classes)):
            raise ValueError("another number of classes than of outputs")
        self.classes_ = classes


class NarrowRegressor(_CheckedScore, RegressorMixin, NarrowEstimator):
    """Numbers as outputs, neither scaled nor centred."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the network at the kernel time ``time``.

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
        self._fit_outputs(x, targets.reshape(len(targets), -1))
        self._flat = targets.ndim == 1
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """The outputs at X [n, n_features]: [n], or [n, d_out] if y had two axes. float64."""
        outputs = self._outputs_at(X)
        return outputs[:, 0] if self._flat else outputs

    def __sklearn_tags__(self) -> Tags:
        """scikit-learn's tags of a regressor with several outputs."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _targets_described(self) -> dict[str, Any]:
        return {"flat": self._flat}

    def _restore_targets(self, about: dict[str, Any]) -> None:
        if type(about["flat"]) is not bool or about["flat"] and self._output_count() > 1:
            raise ValueError("several outputs in one column")
        self._flat = about["flat"]

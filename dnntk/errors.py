"""The package's own exceptions: input that a user can mend, and a run that went astray."""

from typing import Any


class InputError(ValueError):
    """Bad input: one line saying what was expected, what came, how to mend it."""


class Diverged(ArithmeticError):
    """The loss became NaN or grew without bound.

    Attributes:
      history: the evaluations until then.
    """

    def __init__(self, message: str, history: list[dict[str, Any]]) -> None:
        """Keep ``history`` beside the one-line message."""
        super().__init__(message)
        self.history = history

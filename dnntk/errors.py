"""The package's own exceptions: bad input, a run that diverged, a run that was stopped."""

from typing import Any

__all__ = ["Diverged", "InputError", "Interrupted", "Stopped"]


class InputError(ValueError):
    """Bad input: one line with the expectation, the value that came, and advice."""


class Diverged(ArithmeticError):
    """The loss became NaN or grew without bound.

    Attributes:
        history: the evaluations until then.
    """

    def __init__(self, message: str, history: list[dict[str, Any]]) -> None:
        """Keep ``history`` beside the one-line message."""
        super().__init__(message)
        self.history = history


class Stopped(SystemExit):
    """SIGTERM: everything is written, and the process ends with status 128 + 15.

    Attributes:
        message: one line that says how to resume.
    """

    def __init__(self, message: str) -> None:
        """Keep ``message``; a process that does not catch this exception ends silently."""
        super().__init__(143)
        self.message = message


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGINT: everything is written; a script ends with status 128 + 2.

    Attributes:
        message: one line that says how to resume.
    """

    def __init__(self, message: str) -> None:
        """Keep ``message``, which a notebook shows."""
        super().__init__(message)
        self.message = message

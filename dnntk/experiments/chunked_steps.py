"""Take many training steps in few calls of about a second each."""

import time
from collections.abc import Callable, Iterator, Sequence

from dnntk.runtime.progress import progress_bar

__all__ = ["chunked_steps"]

# Longest time that a call should take, so that the progress bar moves.
SECONDS_A_CALL = 2.0


def chunked_steps(
    take_steps: Callable[[int], float],
    stops: Sequence[int],
    label: str,
    progress: bool,
    first: int = 0,
) -> Iterator[tuple[int, float]]:
    """Take all steps up to the last of ``stops``, with a progress bar.

    Args:
        take_steps: takes the given number of steps, waits for them and returns the loss.
        stops: numbers of steps, ascending; a call ends at each of them.
        label: text of the progress bar.
        progress: show the bar.
        first: number of steps already taken.

    Yields:
        (step, loss) after every call of ``take_steps``.
    """
    step, chunk = first, 1
    with progress_bar(
        total=stops[-1], initial=first, desc=label, unit="step", disable=not progress
    ) as bar:
        while step < stops[-1]:
            count = min(chunk, next(stop for stop in stops if stop > step) - step)
            start = time.perf_counter()
            loss = take_steps(count)
            if count == chunk and time.perf_counter() - start < SECONDS_A_CALL / 2:
                chunk *= 2
            step += count
            bar.update(count)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            yield step, loss

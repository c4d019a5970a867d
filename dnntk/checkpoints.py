"""Checkpoints of a run by orbax: written whole or not at all, the newest readable one restored."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dnntk.errors import InputError


class Checkpoints:
    """The last ``keep`` states of a run under ``folder``; a context manager.

    States are pytrees of arrays, kept on the host's side, so that a run may go on with another
    number of devices.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Open ``folder``, making it where it is missing."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder."""
        self._manager.close()

    def save(self, step: int, state: Any) -> None:
        """Write ``state`` under ``step``; a state already kept under it stays."""
        if step not in self._manager.all_steps():
            host = jax.tree.map(np.asarray, state)
            self._manager.save(step, args=ocp.args.StandardSave(_without_empty(host)))

    def newest(self) -> Any:
        """The newest state, NumPy arrays in plain containers, None for an empty one; or None."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return self._manager.restore(step, args=ocp.args.StandardRestore())

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest readable checkpoint, or None where there is none.

        Raises:
          InputError: checkpoints exist and not one of them can be read as ``like``.
        """
        template = jax.tree.map(np.asarray, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        reason = ""
        for step in steps:
            try:
                kept = ocp.args.StandardRestore(_without_empty(template))
                restored = self._manager.restore(step, args=kept)
            except Exception as error:  # orbax and its backends raise many kinds on damaged files
                reason = reason or str(error).strip().partition("\n")[0][:160]
            else:
                for damaged in (newer for newer in steps if newer > step):
                    self._manager.delete(damaged)
                whole = jax.tree.map(lambda own, a: own if a is None else a, template, restored)
                return step, whole
        if steps:
            raise InputError(
                f"resume: no checkpoint under {self._manager.directory} can be read ({reason}); "
                "start again in another workdir"
            )
        return None


def _without_empty(state: Any) -> Any:
    """None for empty arrays, which orbax refuses: the middle of a network of two layers."""
    return jax.tree.map(lambda a: a if a.size else None, state)

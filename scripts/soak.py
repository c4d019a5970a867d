r"""Kill training runs at random moments and resume them on random meshes: is nothing lost?

python scripts/soak.py
python scripts/soak.py --kills=1000 --meshes=data:1,data:2,depth:2,data:2+depth:2
python scripts/soak.py --resume

Every run is killed once or more (by SIGKILL or SIGTERM), resumed until it ends, and compared with
an undisturbed run: bit by bit if it stayed on one mesh, otherwise up to rounding.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import jax
import numpy as np
from absl import flags

from dnntk import InputError, TrainConfig, figures, train
from dnntk.figures.soak import soak_figure
from dnntk.runs.folder import RunFolder
from dnntk.runs.locks import freeing_folders
from dnntk.runtime.progress import progress_bar
from dnntk.training.pipeline import parse_mesh

FLAGS = flags.FLAGS
flags.DEFINE_integer("kills", 200, "Kills of all runs together.", lower_bound=1)
flags.DEFINE_list(
    "meshes", ["data:1", "data:2", "depth:2", "data:2+depth:2"], "Meshes; + joins the two axes."
)
flags.DEFINE_float("moves", 0.3, "Fraction of runs that change their mesh.", lower_bound=0)
flags.DEFINE_float("sigterm", 0.2, "Fraction of kills that are SIGTERM.", lower_bound=0)
flags.DEFINE_integer("depth", 22, "Weight layers.", lower_bound=2)
flags.DEFINE_float("early", 0.25, "Fraction of kills that may come before any step.", lower_bound=0)
flags.DEFINE_integer("steps", 400, "Steps of each run.", lower_bound=2)
flags.DEFINE_integer("seed", 0, "Seed of the random moments and meshes.")
flags.DEFINE_bool("resume", False, "Go on with the soak in the workdir.")
flags.DEFINE_string("workdir", "runs/soak", "Folder for all results.")

ROWS, FINAL = "rows.jsonl", "final.npz"
# Largest relative difference between meshes, which add numbers in different orders.
ROUNDING = 1e-4


class Session(NamedTuple):
    """One process of a run: its mesh, the signal that killed it or None, its newest checkpoint."""

    mesh: str
    killed_by: str | None
    step: int


def _training(mesh: str) -> TrainConfig:
    return TrainConfig(
        depth=FLAGS.depth,
        scale=20.0,
        steps=FLAGS.steps,
        batch_size=96,
        checkpoint_every=5,
        mesh=mesh,
    )


def _start(mesh: str, workdir: Path, resume: bool) -> int:
    """The process id of a child that trains in ``workdir``."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        count = int(np.prod(list(parse_mesh(mesh).values())))
        jax.config.update("jax_num_cpu_devices", count)
        result = train(_training(mesh), workdir, resume=resume, progress=False)
        leaves = jax.tree.leaves(result.variables["params"])
        np.savez(workdir / FINAL, *[np.asarray(leaf) for leaf in leaves])
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _finished(child: int, seconds: float = 600.0) -> int:
    """Wait for the child's exit status, which is negative for a signal."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise RuntimeError(f"a run hung for {seconds:.0f} s")


def _final(workdir: Path) -> list[np.ndarray]:
    with np.load(workdir / FINAL, allow_pickle=False) as held:
        return [held[name] for name in held.files]


def _curve(workdir: Path) -> list[tuple[Any, ...]]:
    lines = (json.loads(text) for text in (workdir / "metrics.jsonl").read_bytes().splitlines())
    return [(line["step"], line["train_loss"], line["test_loss"]) for line in lines]


def _stepping(workdir: Path, child: int, lines: int) -> bool:
    """Wait until the run has written more than ``lines`` metrics; False if the run ended first."""
    file = workdir / "metrics.jsonl"
    while not file.exists() or len(file.read_bytes().splitlines()) <= lines:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.002)
    return True


def _newest(workdir: Path) -> int:
    found = (workdir / "checkpoints").glob("*")
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)


class Undisturbed(NamedTuple):
    """A run that is never killed: its folder, its seconds, and the seconds of its steps."""

    workdir: Path
    seconds: float
    stepping: float


def _undisturbed(folder: Path, mesh: str) -> Undisturbed:
    """Train on ``mesh`` to the end, and once more to measure the time."""
    workdir = folder / f"whole-{mesh.replace(',', '+').replace(':', '')}"
    if not (workdir / FINAL).exists():
        status = _finished(_start(mesh, workdir, resume=(workdir / "config.json").exists()))
        if status:
            raise RuntimeError(f"an undisturbed run ended with {status}: {workdir}.log")
    again = folder / f"{workdir.name}-timed-{os.getpid()}"
    begun = time.monotonic()
    child = _start(mesh, again, resume=False)
    _stepping(again, child, 0)
    stepping = time.monotonic()
    _finished(child)
    return Undisturbed(workdir, time.monotonic() - begun, time.monotonic() - stepping)


def _disturbed(workdir: Path, dice: random.Random, whole: dict[str, Undisturbed]) -> Any:
    """Train a run that is killed once or more and resumed until it ends; a row of the table."""
    meshes = list(whole)
    mesh, moves = dice.choice(meshes), dice.random() < FLAGS.moves
    sessions: list[Session] = []
    kills, status = dice.choice((1, 1, 1, 2, 3)), -1
    while status:
        resume = (workdir / "config.json").exists()
        child = _start(mesh, workdir, resume)
        kind = None
        if kills > 0:
            if dice.random() < FLAGS.early:
                time.sleep(dice.uniform(0, whole[mesh].seconds))
            else:
                file = workdir / "metrics.jsonl"
                lines = len(file.read_bytes().splitlines()) if file.exists() else 0
                if _stepping(workdir, child, lines):
                    time.sleep(dice.uniform(0, whole[mesh].stepping))
            by_term = dice.random() < FLAGS.sigterm
            kind = "SIGTERM" if by_term else "SIGKILL"
            os.kill(child, signal.SIGTERM if by_term else signal.SIGKILL)
            kills -= 1
        status = _finished(child)
        if status == 0:
            kind = None  # the run had ended before the signal
        elif status not in (-9, -15, 143) or kind is None:
            raise RuntimeError(f"a run ended with {status}: see {workdir}.log")
        sessions.append(Session(mesh, kind, _newest(workdir)))
        if moves:
            mesh = dice.choice(meshes)
    used = {session.mesh for session in sessions}
    reference = whole[sessions[-1].mesh].workdir
    pairs = list(zip(_final(workdir), _final(reference), strict=True))
    exact = all(np.array_equal(a, b) for a, b in pairs) and _curve(workdir) == _curve(reference)
    off = max(float(np.max(np.abs(a - b))) for a, b in pairs)
    largest = max(float(np.max(np.abs(b))) for _, b in pairs)
    good = exact if len(used) == 1 else off <= ROUNDING * largest
    killed = sum(session.killed_by is not None for session in sessions)
    return {
        **{"sittings": [s._asdict() for s in sessions], "kills": killed, "meshes": len(used)},
        **{"exact": exact, "off": off / largest, "good": good},
    }


def _meshes() -> list[str]:
    meshes = [text.replace("+", ",") for text in FLAGS.meshes if text]
    if not meshes:
        raise InputError("meshes: expected at least one, like data:2+depth:2, got none")
    for mesh in meshes:
        try:
            parse_mesh(mesh)
        except InputError as error:
            raise InputError(str(error).replace("mesh:", "meshes:", 1)) from None
    return meshes


@freeing_folders()
def main() -> None:
    """Kill and resume runs until ``--kills`` is reached; then write the summary and the plot."""
    meshes = _meshes()
    folder = RunFolder(command_line.workdir())
    settings = {name: FLAGS[name].value for name in ("meshes", "depth", "steps", "seed")}
    if not folder.claim(settings, FLAGS.resume):
        folder.write_json("config.json", settings)
    rows = folder.keep_lines(ROWS)
    whole = {mesh: _undisturbed(folder.path, mesh) for mesh in meshes}
    done = sum(row["kills"] for row in rows)
    with progress_bar(total=FLAGS.kills, initial=min(done, FLAGS.kills), unit="kill") as bar:
        while done < FLAGS.kills:
            dice = random.Random(f"{FLAGS.seed} {len(rows)}")
            # A resumed soak starts the run of an interrupted row again.
            workdir = folder.path / f"run-{len(rows)}-{os.getpid()}"
            row = _disturbed(workdir, dice, whole)
            rows.append(row)
            folder.append(ROWS, row)
            done += row["kills"]
            bar.update(row["kills"])
            bar.set_postfix(wrong=sum(not row["good"] for row in rows))
    summary = {
        "runs": len(rows),
        "kills": done,
        "wrong": sum(not row["good"] for row in rows),
        "on_one_mesh": sum(row["meshes"] == 1 for row in rows),
        "of_these_exact": sum(row["exact"] for row in rows if row["meshes"] == 1),
        "largest_difference": max(row["off"] for row in rows),
    }
    folder.write_json("summary.json", summary)
    figures.draw(folder.path / "soak", soak_figure, rows, FLAGS.steps)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    print(f"results: {FLAGS.workdir}")
    if summary["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)

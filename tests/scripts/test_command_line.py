"""What all scripts share: help, one line for bad input, nothing left behind, jobs begun again."""

import dataclasses
import json
import re

import command_lines
import processes
import pytest

from dnntk import TrainConfig, train
from dnntk.errors import InputError
from dnntk.experiments.accumulation import AccumulationConfig, accumulate
from dnntk.experiments.depth_or_width.experiment import DepthOrWidthConfig, compare
from dnntk.experiments.limit_convergence import LimitConfig, converge_to_limit
from dnntk.experiments.trainability import trainability
from dnntk.experiments.trainability_config import TrainabilityConfig
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.prediction import predict
from dnntk.runs.folder import CONFIG, DIVERGED, SUMMARY, RunFolder

SMALL = TrainConfig(depth=4, steps=2)
# A value that only the checks behind the flags can refuse.
WRONG = {
    "acceptance.py": "--checks=none",
    "accumulation.py": "--dataset=mnist --data_dir=nowhere",
    "benchmark.py": "--benchmarks=none",
    "catapult.py": "--ratios=2,1",
    "cross_entropy.py": "--smoothings=1",
    "depth_or_width.py": "--data_dir=nowhere --datasets=mnist",
    "depth_transfer.py": "--tune_depth=31",
    "errata.py": "--depth=1",
    "features.py": "--trained=20",
    "initialization.py": "--kernel_size=2",
    "limit_convergence.py": "--dataset=mnist --data_dir=nowhere",
    "million_rows.py": "--parts=none",
    "ntk_convergence.py": "--depths=1",
    "parallel_depth.py": "--scales=few",
    "plan_gram.py": "--nodes=0",
    "predict.py": "--train_examples=999",
    "regimes.py": "--depths=2",
    "required_depth.py": "--depths=1",
    "report.py": "--runs=nowhere",
    "soak.py": "--meshes=rows:2",
    "train.py": "--pool=3",
    "trainability.py": "--dataset=mnist --data_dir=nowhere",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """(folder, {(script, flags): outcome})."""
    folder = tmp_path_factory.mktemp("refused")
    cases = {(script, flags): (script, *flags.split()) for script, flags in WRONG.items()}
    for flags in ("--workdir=", "--wrokdir=x", "--seed=one --depth=ten", "stray"):
        cases["train.py", flags] = ("train.py", *flags.split())
    return folder, command_lines.outcomes(None, cases, folder)


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_value_is_one_line_and_leaves_nothing(refused, script):
    folder, found = refused
    assert not any(folder.iterdir())
    for (other, flags), done in found.items():
        if other == script:
            assert done.returncode == 2, (flags, done)
            assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{script}: "), done
            assert "Traceback" not in done.stdout


def test_a_line_of_the_library_s_names_the_flag(refused):
    _, found = refused
    named = [done.stderr for (script, flags), done in found.items() if flags == WRONG[script]]
    assert sum(": --" in line or ": flag --" in line for line in named) == len(named), named
    assert found["train.py", "--pool=3"].stderr.startswith("train.py: --pool")


# The help of a script, and the names, defaults and texts of its flags.
HELP = """
import json, runpy, sys
sys.argv.append("--help")
script = runpy.run_path(sys.argv[0], run_name="__main__")
modules = script["FLAGS"].flags_by_module_dict()
names = [name for name in modules if not name.startswith(("absl", "orbax"))]
own = [flag for name in names for flag in modules[name]]
print(json.dumps([(flag.name, flag.default_as_str, flag.help) for flag in own]), file=sys.stderr)
"""
# With no flag given, a script's configuration is that of the library.
DEFAULTS = """
import dataclasses, runpy, sys
script = runpy.run_path(sys.argv[0])
script["FLAGS"](sys.argv)
kinds = [one for one in script.values() if isinstance(one, type)]
(config,) = filter(dataclasses.is_dataclass, kinds)
assert script["command_line"].from_flags(config) == config()
print(config.__name__)
"""
CONTRACT = (
    "arch depth dataset classes data_dir pool scale rho beta init parametrization optimizer "
    "momentum time_step lr steps epochs batch_size eval_every checkpoint_every resume dtype "
    "seed workdir"
)


def test_help_of_every_script_lists_all_its_flags(tmp_path):
    found = command_lines.outcomes(None, {script: [script] for script in WRONG}, tmp_path, HELP)
    for script, done in found.items():
        assert done.returncode == 0, done
        flags = json.loads(done.stderr)
        assert len(flags) >= 3
        for name, default, text in flags:
            assert re.match(r".+ .+\.$", text, re.DOTALL), (script, name, text)
            line = rf"^  --(\[no\])?{name}: .*"
            if default is not None:
                line += rf"(\n    (?!\(default).*)*\n    \(default: {re.escape(default)}\)"
            assert re.search(line, done.stdout, re.MULTILINE), (script, name)
    assert set(CONTRACT.split()) <= {name for name, _, _ in json.loads(found["train.py"].stderr)}


def test_a_full_help_is_there_too(tmp_path):
    done = processes.outcome("train.py", "--helpfull", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and "--depth" in done.stdout


def test_without_flags_a_configuration_has_its_own_defaults(tmp_path):
    configured = "accumulation catapult cross_entropy depth_or_width depth_transfer errata features"
    others = "initialization limit_convergence ntk_convergence predict regimes required_depth"
    scripts = f"{configured} {others} train trainability".split()
    cases = {script: [f"{script}.py"] for script in scripts}
    for script, done in command_lines.outcomes(None, cases, tmp_path, DEFAULTS).items():
        assert done.returncode == 0 and done.stdout.endswith("Config\n"), (script, done.stderr)


def test_a_reader_that_has_gone_ends_no_script(tmp_path):
    code = """
import os, runpy, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    (done,) = processes.outcomes("plan_gram.py", {"": ()}, tmp_path, code=code).values()
    assert done.returncode == 0 and not done.stderr


def test_sigterm_ends_a_script_whose_threads_still_compute(tmp_path):
    code = """
import os, signal
import command_line, jax, jax.numpy as jnp

def main():
    body = lambda i, x: jnp.sin(x @ x)
    x = jnp.ones((100, 100))
    pending = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, body, x))(x)
    os.kill(os.getpid(), signal.SIGTERM)

command_line.run(main)
"""
    (done,) = processes.outcomes("plan_gram.py", {"": ()}, tmp_path, code=code).values()
    assert done.returncode == 143 and len(done.stderr.splitlines()) == 1, done


# ---- folders


@pytest.mark.parametrize(
    "begin",
    [
        lambda w: train(dataclasses.replace(SMALL, classes=(0, 12)), w),
        lambda w: predict(PredictConfig(train_examples=999), w),
        lambda w: accumulate(AccumulationConfig(dataset="mnist", data_dir="no"), w),
        lambda w: converge_to_limit(LimitConfig(dataset="mnist", data_dir="no"), w),
        lambda w: compare(DepthOrWidthConfig(datasets=("mnist",), data_dir="no"), w),
        lambda w: trainability(TrainabilityConfig(dataset="mnist", data_dir="no"), w),
        lambda w: trainability(TrainabilityConfig(preset="cnn-4000", data_dir="no"), w),
    ],
)
def test_what_is_refused_leaves_no_folder(begin, tmp_path):
    for workdir in ("runs/new", "."):
        with pytest.raises(InputError):
            begin(tmp_path / workdir)
        assert not any(tmp_path.iterdir())


def test_a_job_that_is_submitted_again_begins_where_nothing_was_written(tmp_path, caplog):
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in (".lock", f".{CONFIG}.partial"):
        (killed / name).write_text("")
    for workdir in (tmp_path / "new", killed):
        with caplog.at_level("INFO", "dnntk"):
            first = train(SMALL, workdir, resume=True, progress=False)
        assert f"resume: {workdir} holds no run yet; starting one" in caplog.messages
        again = train(SMALL, workdir, resume=True, progress=False)
        assert first.summary["train_loss"] == again.summary["train_loss"]


@pytest.mark.parametrize("name", ["notes.txt", SUMMARY, ".hidden", "partial", "sub/x"])
def test_a_folder_that_holds_something_else_is_not_resumed(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=f"resume: expected a run in .*, found no {CONFIG}"):
        RunFolder(tmp_path).claim({}, resume=True)
    assert RunFolder(tmp_path).claim({}, resume=False) is False


def test_the_scripts_and_functions_claim_alike(tmp_path):
    folder = RunFolder(tmp_path / "w")
    assert folder.claim({"depth": 3}, resume=True) is False
    folder.write_json(CONFIG, {"depth": 3})
    assert folder.claim({"depth": 3}, resume=True) is True
    with pytest.raises(InputError, match="was started with depth=3, got 4"):
        folder.claim({"depth": 4}, resume=True)
    with pytest.raises(InputError, match="holds one"):
        folder.claim({"depth": 3}, resume=False)


def begin(runs, name, *marks, **fields):
    folder = RunFolder(runs / name)
    folder.make()
    for mark, content in {
        CONFIG: TrainConfig().to_json() | fields,
        **dict.fromkeys(marks, {}),
    }.items():
        folder.write_json(mark, content)


def test_resume_by_itself_names_the_newest_run_that_is_not_at_its_end(tmp_path):
    runs = tmp_path / "runs"
    begin(runs, "older", depth=4)
    begin(runs, "unfinished", depth=5)
    begin(runs, "finished", SUMMARY)
    begin(runs, "diverged", DIVERGED)
    begin(runs, "prediction", rho=[1.0])
    (runs / "damaged").mkdir()
    (runs / "damaged" / CONFIG).write_text("{")
    done = processes.outcome("train.py", "--resume", "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resume: runs/unfinished, " in done.stdout.splitlines()[0]
    for name in ("older", "unfinished"):
        RunFolder(runs / name).write_json(SUMMARY, {})
    done = processes.outcome("train.py", "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "neither is finished nor diverged" in done.stderr

"""train.py through its real command line: refusals, logs, a run that is killed and resumed."""

import gzip
import json
import struct

import command_lines
import numpy as np
import processes
import pytest

WATCHED = (
    "--arch=cnn",
    "--depth=60",
    "--steps=80",
    "--eval_every=8",
    "--checkpoint_every=4",
    "--batch_size=100",
)
SMALL = ("--depth=20", "--steps=12", "--eval_every=4", "--checkpoint_every=2")


def run(*flags, cwd):
    return processes.outcome("train.py", *flags, cwd=cwd)


def idx(array, magic=None):
    kind = {1: 2049, 3: 2051}[array.ndim] if magic is None else magic
    return struct.pack(f">{1 + array.ndim}I", kind, *array.shape) + array.tobytes()


def write_idx_folder(folder, **replaced):
    """A small MNIST look-alike; ``replaced`` gives some files other bytes, None leaves one out."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        for stem, content in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ):
            data = replaced.get(stem.replace("-", "_"), gzip.compress(idx(content)))
            if data is not None:
                (folder / f"{stem}.gz").write_bytes(data)
    return folder


LABELS, IMAGES = "train_labels_idx1_ubyte", "train_images_idx3_ubyte"
GOOD_LABELS = idx(np.arange(40, dtype=np.uint8) % 10)
GOOD_IMAGES = idx(np.zeros((40, 28, 28), np.uint8))
BAD_FILES = {
    "missing labels": {LABELS: None},
    "empty file": {IMAGES: b""},
    "not gzip": {IMAGES: b"hello" * 100},
    "truncated gzip": {IMAGES: gzip.compress(GOOD_IMAGES)[:-20]},
    "flipped bit": {LABELS: bytes(gzip.compress(GOOD_LABELS)[:-6]) + b"\1\2\3\4\5\6"},
    "truncated images": {IMAGES: gzip.compress(GOOD_IMAGES[:-9])},
    "trailing bytes": {LABELS: gzip.compress(GOOD_LABELS + b"xx")},
    "labels as images": {IMAGES: gzip.compress(GOOD_LABELS)},
    "fewer labels": {LABELS: gzip.compress(idx(np.zeros(39, np.uint8)))},
    "labels out of range": {LABELS: gzip.compress(idx(np.full(40, 11, np.uint8)))},
    "a thousand million images": {
        IMAGES: gzip.compress(struct.pack(">4I", 2051, 10**9, 28, 28) + bytes(100))
    },
    "other image size": {IMAGES: gzip.compress(idx(np.zeros((40, 20, 28), np.uint8)))},
}
BAD_FLAGS = {
    "unknown flag": (["--depht=10"], "depht"),
    "stray word": (["depth=10"], "depth=10"),
    "depth not a number": (["--depth=ten"], "--depth=ten: expected a whole number"),
    "rho not a number": (["--rho=x"], "--rho=x: expected a number"),
    "depth too small": (["--depth=1"], "depth"),
    "arch": (["--arch=rnn"], "arch"),
    "dataset": (["--dataset=imagenet"], "dataset"),
    "classes not numbers": (["--classes=zero,one"], "classes"),
    "one class": (["--classes=3"], "classes"),
    "class repeated": (["--classes=3,3"], "classes"),
    "class not in the data": (["--classes=0,12"], "classes"),
    "negative scale": (["--scale=-4"], "scale"),
    "scale not a number": (["--scale=nan"], "scale"),
    "infinite scale, literal matrices": (["--scale=inf", "--parametrization=standard"], "scale"),
    "infinite scale, baseline": (["--scale=inf", "--init=he_uniform"], "scale"),
    "infinite scale, raw rate": (["--scale=inf", "--lr=0.1"], "lr"),
    "rho": (["--rho=-1"], "rho"),
    "beta": (["--beta=inf"], "beta"),
    "init": (["--init=xavier"], "init"),
    "parametrization": (["--parametrization=mup"], "parametrization"),
    "optimizer": (["--optimizer=lbfgs"], "optimizer"),
    "optimizer without rate": (["--optimizer=adam"], "depth_rate"),
    "momentum of one": (["--momentum=1"], "momentum"),
    "momentum with adam": (["--optimizer=adam", "--lr=0.1", "--momentum=0.9"], "momentum"),
    "time_step": (["--time_step=0"], "time_step"),
    "two rates": (["--time_step=0.1", "--lr=0.1"], "--lr, --time_step:"),
    "two lengths": (["--steps=5", "--epochs=2"], "--steps, --epochs, --time:"),
    "steps": (["--steps=0"], "steps"),
    "time": (["--time=inf"], "time"),
    "batch_size": (["--batch_size=-1"], "batch_size"),
    "eval_every": (["--eval_every=-2"], "eval_every"),
    "dtype": (["--dtype=float16"], "dtype"),
    "seed": (["--seed=-1"], "seed"),
    "pool": (["--pool=3"], "pool"),
    "no mesh": (["--mesh=rows:2"], "mesh"),
    "a thousand devices": (["--mesh=data:1000"], "mesh"),
    "processes that never meet": (["--processes=2"], "coordinator"),
    "coordinator without a port": (
        ["--coordinator=host", "--processes=2", "--process=0"],
        "coordinator",
    ),
    "even filter": (["--arch=cnn", "--kernel_size=4"], "kernel_size"),
    "toy images": (["--dataset=toy", "--arch=cnn"], "dataset"),
    "no such folder": (["--dataset=mnist", "--data_dir=nowhere"], "data_dir"),
    "folder without data": (["--dataset=mnist", "--data_dir=."], "data_dir"),
    "something else to resume": (["--resume", "--workdir=notes"], "resume"),
    "workdir is a file": (["--workdir=afile"], "workdir"),
    "config is not JSON": (["--resume", "--workdir=damaged"], "resume"),
    "another run's workdir": (["--workdir=runs/cnn-digits-depth60"], "workdir"),
    "resume with another depth": (
        ["--resume", "--workdir=runs/cnn-digits-depth60", "--depth=30"],
        "depth",
    ),
}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(folder, finished process) of a run that nobody named a workdir for."""
    folder = tmp_path_factory.mktemp("first")
    return folder, run(*WATCHED, cwd=folder)


@pytest.fixture(scope="module")
def bad_command_lines(first_run):
    """(folder to run them in, name -> flags)."""
    folder, _ = first_run
    (folder / "afile").write_text("")
    (folder / "damaged").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "notes.txt").write_text("")
    (folder / "damaged" / "config.json").write_text("{")
    jobs = {name: flags for name, (flags, _) in BAD_FLAGS.items()}
    for name, replaced in BAD_FILES.items():
        data = write_idx_folder(folder / name.replace(" ", "_"), **replaced)
        jobs[name] = ["--dataset=mnist", f"--data_dir={data}"]
    return folder, jobs


@pytest.fixture(scope="module")
def refusals(bad_command_lines):
    """Every bad command line: name -> outcome."""
    folder, jobs = bad_command_lines
    return command_lines.outcomes("train.py", jobs, folder)


def test_a_process_for_many_command_lines_ends_each_as_a_fresh_one(refusals, bad_command_lines):
    folder, jobs = bad_command_lines
    name = "resume with another depth"
    assert processes.run("train.py", *jobs[name], cwd=folder) == refusals[name]


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_status_2(name, refusals):
    processes.check_refusal(refusals[name], "train.py", BAD_FLAGS[name][1])


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_status_2(name, refusals):
    replaced = next(iter(BAD_FILES[name]))
    part = replaced.replace("_idx", "-idx").replace("train_", "train-").rsplit("-", 1)[0]
    processes.check_refusal(refusals[name], "train.py", part.split("-")[1])


def test_help_lists_every_flag_with_its_default(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "--depth" in done.stdout and "(default: '1000')" in done.stdout


def test_a_good_folder_of_idx_files_trains_as_a_user_starts_it(tmp_path):
    data = write_idx_folder(tmp_path / "data")
    flags = ("--dataset=mnist", f"--data_dir={data}", "--classes=all", "--depth=20")
    flags += ("--pool=7", "--steps=4")
    done = processes.run("train.py", *flags, cwd=tmp_path, optimized=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mlp-mnist-depth20" / "summary.json").exists()


def test_the_log_says_what_the_issue_asks_before_the_first_step(first_run):
    _, done = first_run
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines()]
    heads = [head for head in heads if head != "native"]  # it may be built just then
    assert heads[:6] == ["network", "data", "device", "time_step", "compiled", "memory"]
    assert "loss=" in done.stderr and "step/s" in done.stderr


def test_a_diverging_run_ends_in_one_line_of_advice(tmp_path):
    done = run(*SMALL, "--steps=500", "--time_step=0.5", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 1
    assert "lower the time_step" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def metrics(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def killed_run(first_run):
    """(folder, what was there after each kill) of the same command, killed twice and resumed."""
    folder, first = first_run
    assert first.returncode == 0, first.stderr
    cut = folder / "runs" / "cnn-digits-depth60-2"
    left = []
    for flags in (WATCHED, ("--resume", f"--workdir={cut}")):
        begun = newest_checkpoint(cut)
        victim = processes.Running("train.py", *flags, cwd=folder)
        victim.until(lambda b=begun: newest_checkpoint(cut) > b)
        victim.kill()
        victim.wait()
        left.append({"step": newest_checkpoint(cut), "files": {p.name for p in cut.glob("*")}})
    done = run("--resume", f"--workdir={cut}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return cut, left


def newest_checkpoint(folder):
    """The step of the newest one that was written to its end."""
    found = (folder / "checkpoints").glob("*/checksums.json")
    return max((int(p.parent.name) for p in found), default=0)


def test_a_killed_run_resumes_to_the_same_bits(first_run, killed_run):
    from dnntk.runs.checkpoints import Checkpoints

    whole = first_run[0] / "runs" / "cnn-digits-depth60"
    cut, left = killed_run
    assert 0 < left[0]["step"] < left[1]["step"] < 80
    assert not any("summary.json" in after["files"] for after in left)
    assert metrics(cut) == metrics(whole)
    states = []
    for folder in (whole, cut):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            assert newest_checkpoint(folder) == 80
            states.append(checkpoints.newest())
    np.testing.assert_equal(*states)


def test_the_same_command_again_gets_a_folder_of_its_own(killed_run):
    cut, _ = killed_run
    runs = {p.name for p in cut.parent.glob("cnn-*")}
    assert runs == {"cnn-digits-depth60", "cnn-digits-depth60-2"}
    first, second = (
        json.loads((cut.parent / r / "summary.json").read_text()) for r in sorted(runs)
    )
    assert first["steps"] == second["steps"] == 80

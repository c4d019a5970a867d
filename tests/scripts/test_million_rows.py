import json

import image_sets
import processes


def test_rows_are_shifted_images_that_both_learners_take(tmp_path):
    image_sets.write_set(tmp_path / "mnist", image_sets.made_up_set(0))
    small = ["--data_dir=mnist", "--rows=200", "--count=16", "--chunk=64", "--parts=sgd,ridge"]
    done = processes.outcome("million_rows.py", *small, "--workdir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("sgd", "ridge"):
        found = json.loads((tmp_path / f"out/{part}.json").read_text())
        assert found["rows"] == 200 and found["numbers_a_row"] == 24
        assert found["test_error"] <= 1 and found["peak_memory_bytes"] > 1e7

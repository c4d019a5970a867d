r"""One HTML page of many runs: tables, figures and settings, in a file that needs no network.

python scripts/report.py
python scripts/report.py --runs=runs/mlp-digits-depth1000,runs/predict-mlp-digits
python scripts/report.py --runs=runs --workdir=runs --title="Depth against width"
"""

import os

import command_line
from absl import flags

from dnntk.report import TITLE, write_report

FLAGS = flags.FLAGS

flags.DEFINE_string("runs", "runs", "Workdirs, or folders of workdirs, separated by commas.")
flags.DEFINE_string("title", TITLE, "Title of the page.")
flags.DEFINE_string("workdir", "runs/report", "Folder for report.html.")


def main() -> None:
    """Write the page that the flags describe."""
    # The name of a folder may contain a comma.
    single = os.path.isdir(os.path.expanduser(FLAGS.runs))
    runs = [FLAGS.runs] if single else [run for run in FLAGS.runs.split(",") if run]
    print(f"report: {write_report(runs, command_line.workdir(), heading=FLAGS.title)}")


if __name__ == "__main__":
    command_line.run(main)

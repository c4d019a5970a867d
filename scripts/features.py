r"""Quasi-random depth: how near to the limit networks are with each draw of their random units.

python scripts/features.py
python scripts/features.py --case=digits --features=sobol --depths=66,258,1026,4098,16386
python scripts/features.py --case=toy --random_units=1,4,16 --trained_depths=
python scripts/features.py --time=1e4 --trained_depths=
python scripts/features.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.features import QUANTITIES, compare_features
from dnntk.experiments.features_config import CASES, FeaturesConfig
from dnntk.networks.random_units import FEATURES

FLAGS = flags.FLAGS

command_line.define(FeaturesConfig, case=(*CASES, "all"), features=(*FEATURES, "all"))
flags.DEFINE_bool("resume", False, "Go on with the measurements in the workdir.")
flags.DEFINE_string("workdir", "runs/features", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its powers of depth."""
    found = compare_features(
        command_line.from_flags(FeaturesConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for case, draws in found.items():
        for draw, distances in draws.items():
            for quantity in QUANTITIES:
                print(f"{case:10} {draw:10} {quantity:11} {distances.described(quantity)}")
            if (difference := distances.training_difference()) is not None:
                print(f"{case:10} {draw:10} training     changes a distance by {difference:.1e}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)

r"""Networks trained on cross-entropy: do they follow their limit, and does their kernel stay still?

python scripts/cross_entropy.py
python scripts/cross_entropy.py --classes=0,1 --smoothings=0,0.1 --depths=100,1000
python scripts/cross_entropy.py --power=1 --depths=100,300,1000
python scripts/cross_entropy.py --resume
"""

import command_line
from absl import flags

from dnntk.experiments.cross_entropy import measure_cross_entropy
from dnntk.experiments.cross_entropy_config import CrossEntropyConfig

FLAGS = flags.FLAGS

command_line.define(CrossEntropyConfig)
flags.DEFINE_bool("resume", False, "Go on with the measurements in the workdir.")
flags.DEFINE_string("workdir", "runs/cross_entropy", "Folder for all results.")


def main() -> None:
    """Run the experiment that the flags describe, and print its powers of depth."""
    found = measure_cross_entropy(
        command_line.from_flags(CrossEntropyConfig), command_line.workdir(), resume=FLAGS.resume
    )
    for smoothing, each in found.items():
        print(f"smoothing {smoothing:<5g} integral of |delta| {each.integral[-1]:.4g}")
        print(f"smoothing {smoothing:<5g} the limit by steps from the flow {each.by_steps[-1]:.2e}")
        for quantity in ("distance", "movement"):
            print(f"smoothing {smoothing:<5g} {quantity} {each.described(quantity)}")
    print(f"results: {FLAGS.workdir}")


if __name__ == "__main__":
    command_line.run(main)

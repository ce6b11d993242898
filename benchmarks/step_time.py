"""Step time of texp.SGD against torch.optim.SGD: `python benchmarks/step_time.py --help`, or `texp bench`."""

import sys

from texp.cli.app import run

sys.exit(run(["bench", *sys.argv[1:]]))

"""See jaxpretrain/tools/from_torch.py; the same as `python -m jaxpretrain.tools.from_torch`."""

import sys

from jaxpretrain.cli import run
from jaxpretrain.tools.from_torch import main

if __name__ == "__main__":
    sys.exit(run(main))

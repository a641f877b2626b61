"""See jaxpretrain/tools/compare.py; the same as `python -m jaxpretrain.tools.compare`."""

import sys

from jaxpretrain.cli import run
from jaxpretrain.tools.compare import main

if __name__ == "__main__":
    sys.exit(run(main))

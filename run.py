"""The command line of fedlora in a checkout: `python run.py --help`."""

import sys
from pathlib import Path

from fedlora.cli import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "configs"))

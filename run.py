"""The command line of fedlora in a checkout: `python run.py --help`."""

import sys

from fedlora.tools import start

if __name__ == "__main__":
    sys.exit(start.console())

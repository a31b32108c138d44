"""The command line of fedlora in a checkout: `python run.py --help`."""

import sys

from fedlora.app import command

if __name__ == "__main__":
    sys.exit(command.console())

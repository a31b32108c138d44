"""`python -m fedlora`."""

import sys

from fedlora.app import command

if __name__ == "__main__":
    sys.exit(command.console())

"""`python -m fedlora`."""

import sys

from fedlora import command

if __name__ == "__main__":
    sys.exit(command.console())

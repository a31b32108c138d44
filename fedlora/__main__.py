"""`python -m fedlora`."""

import sys

from fedlora.cli import console

if __name__ == "__main__":
    sys.exit(console())

"""`python -m fedlora`."""

import sys

from fedlora.tools import start

if __name__ == "__main__":
    sys.exit(start.console())

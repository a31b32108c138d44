"""The command line of fedlora: `python run.py --help`."""

import sys
from pathlib import Path

from fedlora import command


def main() -> int:
    """The exit status."""
    from fedlora import cli  # takes a second, in which Ctrl-C is to end the command too

    return cli.main(Path(__file__).parent / "configs")


if __name__ == "__main__":
    sys.exit(command.run(main))

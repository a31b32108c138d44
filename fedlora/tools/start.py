"""What the installed commands call. Each is a process of ours from its first moment (`fedlora.app.command`)."""

from __future__ import annotations

from fedlora.app.command import run


def console() -> int:
    """`fedlora`, `python -m fedlora` and `python run.py`."""

    def main() -> int:
        from fedlora.tools import cli  # takes a second, in which a signal is to end the command too

        return cli.console()

    return run(main)


def client() -> int:
    """`fedlora-client`: a service, which ends with 0 when it is stopped."""

    def main() -> int:
        from fedlora.deploy import client

        return client.main()

    return run(main, stopped=0)

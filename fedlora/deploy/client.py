"""`fedlora-client`: a device's side of a federation, in one command.

    fedlora-client --superlink host:port --root-certificates ca.crt --key device.key --client 0 \\
                   --data notes.jsonl --text text --classes no,yes --model <folder> --epsilon 6 --state ~/.fedlora-client

It reads the data and the model, says what will be trained on and what will leave the device, and then connects.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora import check, models
from fedlora.app import command
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, DatasetConfig
from fedlora.deploy.account import Account
from fedlora.deploy.limits import GIGABYTE, Limits
from fedlora.interrupt import CtrlC
from fedlora.validate import checked

if TYPE_CHECKING:
    from fedlora.deploy.sums import SecureSums


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 stopped, 1 the connection failed, 2 something must be put right first."""
    arguments = _parser().parse_args(argv)
    try:
        return check.exit_status(lambda: _run(arguments))
    except KeyboardInterrupt:
        return 0


def _run(arguments: argparse.Namespace) -> int:
    limits = Limits(
        epsilon=check.positive(**{"--epsilon": arguments.epsilon}),
        delta=check.below_one(**{"--delta": check.positive(**{"--delta": arguments.delta})}),
        clip=check.positive(**{"--clip": arguments.clip}),
        steps=check.positive(**{"--max-steps": arguments.max_steps}),
        adjacency=arguments.adjacency,
        rank=check.positive(**{"--max-rank": arguments.max_rank}),
        threads=check.positive(**{"--max-threads": arguments.max_threads}),
        clients=check.positive(**{"--max-clients": arguments.max_clients}),
        rounds=check.positive(**{"--max-rounds": arguments.max_rounds}),
        seconds=check.positive(**{"--max-seconds": arguments.max_seconds}),
        memory=round(check.positive(**{"--memory": arguments.memory}) * GIGABYTE),
    )
    check.not_negative(**{"--client": arguments.client})
    data = DatasetConfig(
        name="files", path=str(arguments.data), test_fraction=0.0, text=arguments.text, image=arguments.image,
        label=arguments.label, columns=arguments.columns.split(",") if arguments.columns else [],
        classes=arguments.classes.split(",") if arguments.classes else [],
    )  # fmt: skip
    if bool(data.text) == bool(data.image):
        raise ConfigError("--text and --image: name one column of the two, such as --text sentence")
    with contextlib.closing(Account(arguments.state, limits)) as account:
        return _take_part(arguments, account, data)


def _take_part(arguments: argparse.Namespace, account: Account, data: DatasetConfig) -> int:
    sums = _sums(arguments)
    agreed = _experiment(arguments.experiment) if arguments.experiment else None

    from fedlora.deploy import preview
    from fedlora.deploy.device import Device
    from fedlora.deploy.holdings import Holdings

    model = (arguments.model, None) if arguments.model in set(models.names()) - {"hf"} else ("hf", arguments.model)
    own = preview.data(Holdings(arguments.client, 0, data, model, arguments.device, arguments.cache, agreed))
    preview.experiment(own, account)
    preview.limits(account)
    account.limits.bound_memory()
    if arguments.check:
        return 0

    from fedlora.deploy.node import Connection, Node

    logging.getLogger("flwr").setLevel(logging.WARNING)
    secure = not arguments.insecure
    if secure and arguments.key is None:
        raise ConfigError(
            "--key is missing: the private key that the server has registered; --insecure does without, for tests"
        )
    connection = Connection(
        arguments.superlink, arguments.root_certificates, arguments.key, arguments.insecure, arguments.wait, arguments.port
    )
    print(f"connecting to {arguments.superlink}" + ("" if secure else ", in clear text"), flush=True)
    with CtrlC(), Node(connection, arguments.state) as node:
        status = node.serve(Device(own, account, sums=sums))
    if status:
        raise RunError(f"the connection to {arguments.superlink} ended (SuperNode status {status}); its reason stands above")
    return 0


def _sums(arguments: argparse.Namespace) -> SecureSums | None:
    """What the device needs for secure sums, where its owner has named the clients."""
    if arguments.peers is None:
        return None
    if arguments.key is None:
        raise ConfigError("--peers needs --key, this device's private key, which signs what it sends to the others")
    from fedlora.deploy.sums import SecureSums
    from fedlora.secure import Identity

    return SecureSums(Identity.load(arguments.client, arguments.key, arguments.peers), arguments.state)


def _experiment(path: Path) -> Config:
    from fedlora.app.records import settings_of

    try:
        return checked(settings_of(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"--experiment {path} is not a run's config.json ({str(error)[:200]})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedlora-client", description=__doc__.split("\n")[0], allow_abbrev=False)
    reach = parser.add_argument_group("the server")
    reach.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="address of the SuperLink, or of the proxy before it"
    )
    reach.add_argument(
        "--root-certificates", type=Path, metavar="FILE", help="CA of the server's certificate; none: the system's"
    )
    reach.add_argument(
        "--key", type=Path, metavar="FILE", help="this device's private key, whose public half the server registered"
    )
    reach.add_argument("--insecure", action="store_true", help="no TLS and no key, for tests on one machine")
    reach.add_argument(
        "--wait",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to try a server that is out of reach or does not take this device yet (default: 600)",
    )
    own = parser.add_argument_group("this device")
    own.add_argument("--client", type=int, required=True, metavar="K", help="its number in the federation, from 0")
    own.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="CSV, TSV, JSON Lines or Parquet; never leaves the device"
    )
    own.add_argument("--text", metavar="COLUMN", help="column of the text")
    own.add_argument("--image", metavar="COLUMN", help="column of the image's path")
    own.add_argument("--label", default="label", metavar="COLUMN", help="column of the label (default: label)")
    own.add_argument("--columns", metavar="A,B", help="names of the columns, for a CSV or TSV without a header line")
    own.add_argument(
        "--classes", metavar="A,B", help="all labels of the federation (default: those of --experiment, or of the model)"
    )
    own.add_argument("--model", default="vit_digits", metavar="MODEL", help="a Hugging Face folder, or vit_digits (default)")
    own.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    own.add_argument(
        "--cache", type=float, default=1.0, metavar="GB", help="memory for the outputs of frozen blocks (default: 1)"
    )
    own.add_argument("--state", type=Path, default=Path.home() / ".fedlora-client", metavar="FOLDER",
        help="ledger, secret and the client's own state (default: ~/.fedlora-client)")  # fmt: skip
    own.add_argument(
        "--port",
        type=int,
        default=9094,
        help="port of its SuperNode on 127.0.0.1; devices on one machine need different ones (default: 9094)",
    )
    limits = parser.add_argument_group("limits, whatever the server asks for")
    limits.add_argument(
        "--epsilon",
        type=float,
        required=True,
        metavar="ε",
        help="budget for all experiments together; inf: no privacy is demanded",
    )
    limits.add_argument(
        "--delta",
        type=float,
        default=1e-5,
        metavar="δ",
        help="δ of that budget, and the largest that an experiment may have (default: 1e-5)",
    )
    limits.add_argument(
        "--clip", type=float, default=1.0, metavar="C", help="largest privacy.clip that an experiment may have (default: 1)"
    )
    limits.add_argument(
        "--adjacency", default="add_remove", choices=("add_remove", "replace"),
        help="neighbours of ε: data with and without a record (default), or with another record in its place",
    )  # fmt: skip
    limits.add_argument("--max-steps", type=int, default=1000, metavar="N", help="local steps a round (default: 1000)")
    limits.add_argument(
        "--peers", type=Path, metavar="FILE", help="public keys of all clients, for aggregation=secure: one line each, K KEY"
    )
    for name, kind, metavar, what in (
        ("rank", int, "R", "rank of the adapters"),
        ("threads", int, "N", "threads"),
        ("clients", int, "N", "clients of the federation"),
        ("rounds", int, "N", "rounds of an experiment"),
        ("seconds", float, "S", "seconds for one message"),
    ):
        usual = getattr(Limits, name)
        limits.add_argument(
            f"--max-{name}", type=kind, default=usual, metavar=metavar, help=f"{what}, at most (default: {usual:g})"
        )
    limits.add_argument(
        "--memory", type=float, default=Limits.memory / GIGABYTE, metavar="GB",
        help=f"of this process (default: half of the machine's, {Limits.memory / GIGABYTE:.3g})",
    )  # fmt: skip
    limits.add_argument(
        "--experiment",
        type=Path,
        metavar="FILE",
        help="config.json of the one experiment that the device takes part in; none: any within the limits",
    )
    parser.add_argument("--check", action="store_true", help="say what the device would do, and do not connect")
    return parser


if __name__ == "__main__":
    sys.exit(command.run(main, stopped=0))

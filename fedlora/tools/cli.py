"""The commands: what a user typed is checked whole (`fedlora.app.compose`), for every cell of a sweep, before any work."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedlora import check, interrupt
from fedlora.app.compose import compose as compose  # for those who make a configuration from a command line
from fedlora.app.compose import compose_all, config_folder, expand
from fedlora.config import Config, declared

if TYPE_CHECKING:
    from fedlora.app.study import Study

EXAMPLES = (
    "strategy=fedsvd clients=50",
    "-m strategy=fedsvd,ffa_lora seed=1,2,3 rounds=20",
    "experiment=sst2 dataset.path=train.tsv dataset.test=test.tsv model.path=bert-base-uncased plan=true",
)

DETAILED = 3  # cells of a sweep whose plans are printed whole


def console() -> int:
    """The command `fedlora`, and `python -m fedlora`."""
    return main(config_folder())


def main(configs: Path, argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for, with the configuration files in the folder `configs`. Returns the exit status.

    0: done; 1: a run failed; 2: a setting, a file or a model must be put right first; 130: stopped by Ctrl-C,
    143 by SIGTERM.
    """
    try:
        return check.exit_status(lambda: _command(configs, _parser().parse_intermixed_args(argv)))
    except BrokenPipeError:  # `--help | head`: nobody reads on, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{interrupt.reason()} before a result was written", file=sys.stderr)
        return interrupt.status()


def _command(configs: Path, arguments: argparse.Namespace) -> int:
    if arguments.help:
        print(help_text(configs))
        return 0
    if arguments.version:
        print(f"fedlora {version('fedlora')}")
        return 0
    from fedlora.app.study import Study

    cells = compose_all(configs, expand(arguments.overrides, arguments.multirun), arguments.multirun)
    if arguments.list:
        return _list(cells[0])
    study = Study.of(cells) if len(cells) > 1 else None
    cells = study.cells if study else cells
    if cells[0].deploy:
        return _deploy(cells, configs.parent, study)
    return _plan(cells) if cells[0].plan else _run(cells, study)


# ---- the work


def _run(cells: list[Config], study: Study | None) -> int:
    """Run the cells; of several, a failed one is shown and the rest go on, and a table is their end."""
    from fedlora.app import cells as work
    from fedlora.app.study import table

    _quiet()
    done = work.run(cells, study)
    statuses = {summary["status"] for _, summary in done}
    if "interrupted" in statuses:
        return interrupt.status()
    if study:
        table(study, done)
    return 1 if "failed" in statuses else 0


def _deploy(cells: list[Config], checkout: Path, study: Study | None) -> int:
    """Run, or plan, the cells on real devices, one after another; one that fails ends it, since its devices may be gone."""
    from fedlora.app import door, terminal
    from fedlora.app.study import table
    from fedlora.deploy import app, launch

    _quiet()
    if not cells[0].plan:
        door.ready(cells, study)
        if study:
            study.write()
    done = []
    with app.folder(checkout) as folder:
        for cell in cells:
            if cell.plan:
                launch.plan(cell, folder)
                continue
            summary = launch.run(cell, folder)
            terminal.conclude(cell, summary)
            if summary["status"] == "interrupted":
                return interrupt.status()
            done.append((cell, summary))
    if study and done:
        table(study, done)
    return 0


def _plan(cells: list[Config]) -> int:
    """Print what each cell would come to, and train nothing; of a long sweep only the table of all its cells."""
    from fedlora.app import cells as work
    from fedlora.app import door, experiment

    _quiet()
    door.check_sources(cells)
    estimates, noise = zip(*[experiment.foretell(cell, show=len(cells) <= DETAILED) for cell in cells], strict=True)
    if len(cells) > 1:
        work.show_plan(cells, estimates, noise)
    return 0


def _list(config: Config) -> int:
    """Print the strategies: paper, what they train, what a client of this model sends and is sent, and what goes with them."""
    import strategies
    from fedlora.app import assembly, experiment, terminal, traffic
    from fedlora.compute import workbench

    _quiet()
    bench = workbench.build(config)
    rows = []
    for name in strategies.names():
        held = replace(config.evaluate, holdout=config.evaluate.holdout or 0.2)  # some cannot do without
        strategy = assembly.make_strategy(replace(config, strategy={"name": name}, evaluate=held))
        state = experiment.initial_state(bench, strategy)
        trains = strategy.trains + (f" ({strategy.personal} and head stay)" if strategy.personal else "")
        exact = "exact" if strategy.exact else "biased"
        own = ", ".join(f"{key}={p.default}" for key, p in strategies.settings(name).items())
        sent = traffic.of_run(config, strategy, state)
        up, down = terminal.size(sent.up_each), terminal.size(sent.down_each)
        secure = "yes" if strategy.linear else "no"
        paper = strategy.paper or "–"
        rows.append([name, paper, trains, up, down, exact, strategy.unequal.value, strategy.private.value, secure, own])
    columns = ["strategy", "paper", "trains", "up", "down", "merge", "unequal ranks", "DP-SGD", "secure sums", "settings"]
    what = f"{config.model.name}, rank {config.adapter.rank}: bytes of a client and round"
    terminal.table(f"{what}, on average over rounds={config.rounds} of {config.cohort_size} clients", columns, rows)
    return 0


def help_text(configs: Path) -> str:
    """Usage, three examples, the groups with their options, and every setting with its default and meaning."""
    import strategies
    from fedlora.app import reads

    lines = [f"usage: {check.command()} [-m] [--list] [setting=value …]", "", "examples:"]
    lines += [f"  {check.command()} {example}" for example in EXAMPLES]
    lines += ["", "flags:", "  -m, --multirun  run one cell for each combination of a,b,c values",
              "  --list          the strategies: paper, what they train, bytes, exactness",
              "  --version       the version of fedlora", ""]  # fmt: skip
    lines.append("groups:")
    for folder in sorted(folder for folder in configs.iterdir() if folder.is_dir() and not folder.name.startswith("_")):
        lines.append(f"  {folder.name}={'|'.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    lines += ["", "settings (default): meaning"]
    for name, setting in declared().items():
        if name != "strategy":
            lines.append(f"  {name} ({_shown(setting.default)}): {reads.prefix(name)}{setting.help}")
    owners: dict[tuple[str, Any, str], list[str]] = {}
    for strategy in strategies.names():
        for name, own in strategies.settings(strategy).items():
            meaning = f"{', '.join(own.only)}: {own.help}" if own.only else own.help
            owners.setdefault((name, own.default, meaning), []).append(strategy)
    for (name, default, meaning), having in owners.items():
        lines.append(f"  strategy.{name} ({_shown(default)}): {_all_of(having, strategies.names())}: {meaning}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return "none" if default is None else str(default)


def _all_of(some: list[str], every: list[str]) -> str:
    """The names, or those that are missing where these are fewer."""
    others = [name for name in every if name not in some]
    if not others:
        return "all"
    return ", ".join(some) if len(some) <= len(others) else f"all but {', '.join(others)}"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, as of a setting."""

    def error(self, message: str) -> NoReturn:
        raise check.ConfigError(f"{message}; {check.command()} --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=check.command(), add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


def _quiet() -> None:
    """Flower logs every round, and what it says is in rounds.jsonl; its import sets the level, so this comes after it."""
    import flwr.serverapp  # noqa: F401

    logger = logging.getLogger("flwr")
    logger.setLevel(logging.ERROR)
    logger.propagate = False

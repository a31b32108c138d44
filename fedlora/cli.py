"""The command line: everything a user typed is checked, for every cell of a sweep, before any work is done.

Hydra's grammar and composition are used through its Compose API, so that one path serves a single run and a sweep, and
so that a cell is composed once and what was checked is what is run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import check
from fedlora.check import ConfigError
from fedlora.config import Config, from_dict, settings

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from fedlora.study import Study

EXAMPLES = """examples:
  python run.py strategy=fedsvd clients=50
  python run.py -m strategy=fedsvd,ffa_lora seed=1,2,3 rounds=20
  python run.py experiment=sst2 dataset.path=train.tsv dataset.test=test.tsv model.path=bert-base-uncased plan=true
"""

DETAILED = 3  # cells of a sweep whose plans are printed whole


def main(configs: Path, argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for. Returns the exit status.

    0: done; 1: a run failed; 2: a setting, a file or a model must be put right first; 130: stopped by Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        return check.exit_status(lambda: _command(configs, arguments))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before a result was written", file=sys.stderr)
        return 130


def _command(configs: Path, arguments: argparse.Namespace) -> int:
    if arguments.help:
        print(help_text(configs))
        return 0
    from fedlora.study import Study

    cells = [compose(configs, cell) for cell in expand(arguments.overrides, arguments.multirun)]
    if arguments.list:
        return _list(cells[0])
    study = Study.of(cells) if len(cells) > 1 else None
    cells = study.cells if study else cells
    if cells[0].deploy:
        return _deploy(cells, configs.parent, study)
    return _plan(cells) if cells[0].plan else _run(cells, study)


# ---- before any work


def expand(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The cells of the sweep, each a list of overrides; one cell without `-m`. Raises ConfigError for bad grammar."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ConfigError(f"{error.override} is not an override; write setting=value, such as clients=50") from error
    for override in parsed:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(f"{override.input_line} names several values; add -m to run one cell for each")
    if not multirun:
        return [overrides]
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(cell) for batch in batches for cell in batch]


def compose(configs: Path, overrides: list[str]) -> Config:
    """The checked configuration of one cell. Raises ConfigError, in one sentence, for anything that is wrong with it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from fedlora import server

    for override in OverridesParser.create().parse_overrides(overrides):
        _check_name(configs, override)
    # A strategy's settings are not in the schema: they are added by force here, and checked by the strategy below.
    overrides = [f"++{text}" if text.startswith("strategy.") else text for text in overrides]
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(configs.absolute()), version_base="1.3"):
            composed = hydra_compose("config", overrides)
        OmegaConf.resolve(composed)
        values: Any = OmegaConf.to_container(composed, enum_to_str=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from error
    if values["deploy"]:
        values["partition"] = _own_data(overrides)
    config = from_dict(values)
    config.checked()
    server.make_strategy(config)
    return config


def _own_data(overrides: list[str]) -> dict[str, Any]:
    """The partition of a deployment, which is none of the server's business; nor are the devices' files."""
    for text in overrides:
        if text.startswith(("partition", "dataset.path", "dataset.group")):
            raise ConfigError(f"{text} does not go with deploy, where each device has its own data; remove it")
    return {"name": "own"}


def _check_name(configs: Path, override: Override) -> None:
    """Refuses a setting, or an option of a group, that does not exist, with the nearest one that does."""
    key, value = override.key_or_group, override.value()
    groups = {folder.name for folder in configs.iterdir() if folder.is_dir()}
    if key in groups and not isinstance(value, dict):
        options = {file.stem for file in (configs / key).glob("*.yaml")}
        check.one_of(options, **{key: str(value)})
        return
    names = {name for name, *_ in settings()} | groups
    if key not in names and not key.startswith("strategy."):
        raise ConfigError(f"{key} is not a setting; {check.suggest(key, names)}")


def _one_sentence(error: Exception) -> str:
    """What Hydra and OmegaConf spread over several lines: the complaint, with the setting it is about in front."""
    cause = error.__cause__ if error.__cause__ is not None else error
    key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    first = str(getattr(cause, "msg", None) or cause).strip().splitlines()[0].rstrip(".")
    default = {name: value for name, value, _ in settings()}.get(str(key))
    return f"{key}: {first} (default {default})" if key else first


# ---- the work


def _run(cells: list[Config], study: Study | None) -> int:
    """Run the cells; of several, a failed one is shown and the rest go on, and a table is their end."""
    from fedlora import cells as work
    from fedlora.study import table

    _quiet()
    done = work.run(cells, study)
    statuses = {summary["status"] for _, summary in done}
    if "interrupted" in statuses:
        return 130
    if study:
        table(study, done)
    return 1 if "failed" in statuses else 0


def _deploy(cells: list[Config], project: Path, study: Study | None) -> int:
    """Run, or plan, the cells on real devices, one after another; one that fails ends it, since its devices may be gone."""
    from fedlora import door, terminal
    from fedlora.deploy import launch
    from fedlora.study import table

    _quiet()
    if not cells[0].plan:
        door.ready(cells, study)
        if study:
            study.write()
    done = []
    for cell in cells:
        if cell.plan:
            launch.plan(cell, project)
            continue
        summary = launch.run(cell, project)
        terminal.conclude(cell, summary)
        if summary["status"] == "interrupted":
            return 130
        done.append((cell, summary))
    if study and done:
        table(study, done)
    return 0


def _plan(cells: list[Config]) -> int:
    """Print what each cell would come to, and train nothing; of a long sweep only the table of all its cells."""
    from fedlora import cells as work
    from fedlora import door, experiment

    _quiet()
    door.check_sources(cells)
    estimates, noise = zip(*[experiment.foretell(cell, show=len(cells) <= DETAILED) for cell in cells], strict=True)
    if len(cells) > 1:
        work.show_plan(cells, estimates, noise)
    return 0


def _list(config: Config) -> int:
    """Print the strategies: paper, what they train, what a client of this model sends and is sent, and what goes with them."""
    import strategies
    from fedlora import experiment, server, terminal, traffic, workbench

    _quiet()
    bench = workbench.build(config)
    rows = []
    for name in strategies.names():
        held = replace(config.evaluate, holdout=config.evaluate.holdout or 0.2)  # some cannot do without
        strategy = server.make_strategy(replace(config, strategy={"name": name}, evaluate=held))
        state = experiment.initial_state(bench, strategy)
        trains = strategy.trains + (f" ({strategy.personal} and head stay)" if strategy.personal else "")
        exact = "exact" if strategy.exact else "biased"
        unequal = strategy.unequal if strategy.unequal in ("native", "padded") else "no"
        own = ", ".join(f"{key}={p.default}" for key, p in strategies.settings(name).items())
        sent = traffic.of_run(config, strategy, state)
        up, down = terminal.size(sent.up_each), terminal.size(sent.down_each)
        secure = "yes" if strategy.linear else "no"
        rows.append([name, strategy.paper, trains, up, down, exact, unequal, strategy.private.split(":")[0], secure, own])
    columns = ["strategy", "paper", "trains", "up", "down", "merge", "unequal ranks", "DP-SGD", "secure sums", "settings"]
    what = f"{config.model.name}, rank {config.adapter.rank}: bytes of a client and round"
    terminal.table(f"{what}, on average over rounds={config.rounds} of {config.cohort_size} clients", columns, rows)
    return 0


def help_text(configs: Path) -> str:
    """Usage, three examples, the groups with their options, and every setting with its default and meaning."""
    import strategies

    lines = ["usage: python run.py [-m] [--list] [setting=value …]", "", EXAMPLES]
    lines += ["flags:", "  -m, --multirun  run one cell for each combination of a,b,c values",
              "  --list          the strategies: paper, what they train, bytes, exactness", ""]  # fmt: skip
    lines.append("groups:")
    for folder in sorted(folder for folder in configs.iterdir() if folder.is_dir()):
        lines.append(f"  {folder.name}={'|'.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    lines += ["", "settings (default): meaning"]
    for name, default, meaning in settings():
        if name == "strategy":
            continue
        lines.append(f"  {name} ({'none' if default is None else default}): {meaning}")
    for strategy in strategies.names():
        for name, setting in strategies.settings(strategy).items():
            lines.append(f"  strategy.{name} ({setting.default}): {strategy}: {setting.help}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return parser


def _quiet() -> None:
    """Flower logs every round, and what it says is in rounds.jsonl; its import sets the level, so this comes after it."""
    import flwr.serverapp  # noqa: F401

    logger = logging.getLogger("flwr")
    logger.setLevel(logging.ERROR)
    logger.propagate = False

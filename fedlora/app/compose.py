"""From a command line to checked configurations: the cells of a sweep, every one of them before any work is done.

Hydra's grammar and composition are used through its Compose API, so that one path serves a single run and a sweep, and
so that a cell is composed once and what was checked is what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlora
from fedlora import check
from fedlora.app import grammar, reads
from fedlora.check import ConfigError
from fedlora.config import GROUPS, Config, declared, from_dict, value_of
from fedlora.setting import MULTIRUN, Condition
from fedlora.validate import checked

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

STRATEGY = "strategy."  # what the name of a strategy's own setting begins with


def config_folder() -> Path:
    """The folder of config.yaml: in the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(fedlora.__file__).parent
    inside = package / "configs"
    return inside if (inside / "config.yaml").is_file() else package.parent / "configs"


def expand(arguments: list[str], multirun: bool) -> list[list[str]]:
    """The cells of the sweep, each a list of overrides; one cell without `-m`. Raises ConfigError for bad grammar."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    overrides = grammar.parsed(arguments, multirun)
    if not multirun:
        return [[str(override.input_line) for override in overrides]]
    cells = math.prod(len(grammar.values(override)) for override in overrides if override.is_sweep_override())
    if cells > grammar.MOST_CELLS:
        raise ConfigError(f"the sweep has {cells:,} cells or more, above {grammar.MOST_CELLS:,}; name fewer values")
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [list(cell) for batch in batches for cell in batch]


def compose(folder: Path, overrides: list[str]) -> Config:
    """The checked configuration of one run. Raises ConfigError, in one sentence, for anything that is wrong with it."""
    (cell,) = compose_all(folder, [overrides])
    return cell


def compose_all(folder: Path, cells: Sequence[list[str]], multirun: bool = False) -> list[Config]:
    """The checked configurations of the cells of a sweep, made of the configuration files in `folder`.

    A setting that a cell does not read has its default there. Raises ConfigError, in one sentence, for anything that is
    wrong with any cell, and for a setting that was given and that no cell reads.
    """
    from fedlora.app import assembly

    parsed = [grammar.parsed(overrides, multirun=False) for overrides in cells]
    for override in {str(override.input_line): override for overrides in parsed for override in overrides}.values():
        _check_name(folder, override)
    with _hydra(folder):
        configs = [_composed(overrides) for overrides in parsed]
    parsed = [_counted(overrides) for overrides in parsed]
    named_in = cache(_named_in)
    failing = [reads.unread(config, _named(folder, config, named_in), multirun) for config in configs]
    _refuse_unread(parsed, configs, failing)
    configs = [checked(reads.cleared(config, names)) for config, names in zip(configs, failing, strict=True)]
    configs = _own_settings(parsed, configs)
    for config in configs:
        assembly.make_strategy(config)
    return configs


def _counted(overrides: list[Override]) -> list[Override]:
    """The overrides without those that a later one of the same setting replaces."""
    return list({override.key_or_group: override for override in overrides}.values())


@contextmanager
def _hydra(folder: Path) -> Iterator[None]:
    """Hydra, ready to compose what is in the folder."""
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
        yield


def _composed(overrides: list[Override]) -> Config:
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A strategy's settings are not in the schema: they are added by force here, and checked by the strategy later.
    lines = [
        f"{'++' if override.key_or_group.startswith(STRATEGY) else ''}{override.input_line}"
        for override in overrides
        if (override.key_or_group, override.value()) != ("experiment", None)  # which is what there is without it
    ]
    try:
        composed = hydra_compose("config", lines)
        OmegaConf.resolve(composed)
        values: Any = OmegaConf.to_container(composed, enum_to_str=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
        raise _one_sentence(error, overrides) from error
    if values["deploy"]:
        values["partition"] = _own_data(overrides)
    return from_dict(values)


def _own_data(overrides: list[Override]) -> dict[str, Any]:
    """The partition of a deployment, which is none of the server's business; nor are the devices' files."""
    for override in overrides:
        if override.key_or_group.startswith(("partition", "dataset.path", "dataset.group")) and override.value() is not None:
            raise ConfigError(f"{_typed(override)} does not go with deploy, where each device has its own data; remove it")
    return {"name": "own"}


def _check_name(folder: Path, override: Override) -> None:
    """Refuses a setting, or an option of a group, that does not exist, with the nearest one that does."""
    key, value = override.key_or_group, override.value()
    groups = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("_")}
    if key in groups:
        options = {file.stem for file in (folder / key).glob("*.yaml")}
        if (key, value) == ("experiment", None):
            return
        if str(value) not in options and str(value) in _without_file(key):
            raise ConfigError(
                f"{key}={value} has no file configs/{key}/{value}.yaml, which makes it an option; write one with the line "
                f"name: {value}"
            )
        check.one_of(options, **{key: str(value)})
        return
    if key not in declared().keys() - {"strategy"} and not key.startswith(STRATEGY):
        names = (declared().keys() - {f"{name}.name" for name in GROUPS}) | groups
        also = {other: name for name, item in declared().items() for other in item.also}
        raise ConfigError(f"{check.shown(key)} is not a setting; {check.suggest_setting(key, names, also)}")


def _without_file(group: str) -> list[str]:
    """The options of a group by what there is in code."""
    from fedlora import data, models
    from fedlora.data import partition
    from fedlora.validate import engine_names

    if group == "strategy":
        import strategies

        return strategies.names()
    found = {"dataset": data.names, "model": models.names, "partition": partition.names, "engine": engine_names}
    return found[group]() if group in found else []


def _named(folder: Path, config: Config, named_in: Callable[[Path], set[str]]) -> set[str]:
    """The settings that the files of the chosen options name."""
    return set().union(*(named_in(folder / group / f"{getattr(getattr(config, group), 'name', '')}.yaml") for group in GROUPS))


def _named_in(file: Path) -> set[str]:
    """The settings that the file of one option names; none where there is no such file."""
    from omegaconf import OmegaConf

    if not file.is_file():
        return set()
    whole = "@package _global_" in file.read_text(encoding="utf-8")
    content = OmegaConf.to_container(OmegaConf.load(file))
    groups: Any = content if whole else {file.parent.name: content}
    return {f"{key}.{name}" for key in GROUPS if isinstance(groups.get(key), dict) for name in groups[key] if name != "name"}


def _refuse_unread(cells: list[list[Override]], configs: list[Config], failing: list[dict[str, Condition]]) -> None:
    """Raises ConfigError for a setting that was given, not as null, and that no cell reads.

    Of several it is one that names the option which would read it: that option may read the others too.
    """
    refusals = []
    for place, override in enumerate(cells[0]):
        name = reads.full(override.key_or_group)
        if all(name in names for names in failing) and any(cell[place].value() is not None for cell in cells):
            condition = failing[0][name]
            other = None if condition.key == MULTIRUN else value_of(configs[0], reads.full(condition.key))
            refusals.append((condition.negated, reads.refuse(override.key_or_group, _value(override), condition, other)))
    if refusals:
        raise min(refusals, key=lambda refusal: refusal[0])[1]


def _own_settings(cells: list[list[Override]], configs: list[Config]) -> list[Config]:
    """The configurations without those settings of strategies that only the strategies of other cells read.

    Raises ConfigError for a setting of a strategy that is given and that no cell reads.
    """
    given = [override for override in cells[0] if override.key_or_group.startswith(STRATEGY)]
    if not given:
        return configs
    import strategies

    known = {name: strategies.settings(name) for name in {str(config.strategy["name"]) for config in configs}}
    anywhere = {name for own in known.values() for name in own}
    failing = [_own_unread(config, known[config.strategy["name"]]) for config in configs]
    for override in given:
        name = override.key_or_group.removeprefix(STRATEGY)
        unread = [
            names.get(name) for config, names in zip(configs, failing, strict=True) if name in known[config.strategy["name"]]
        ]
        if unread and all(unread):
            place = next(place for place, names in enumerate(failing) if name in names)
            raise reads.refuse(override.key_or_group, _value(override), *failing[place][name])
    return [
        replace(config, strategy={
            name: value
            for name, value in config.strategy.items()
            if name not in unread and (name in known[config.strategy["name"]] or name not in anywhere)
        })
        for config, unread in zip(configs, failing, strict=True)
    ]  # fmt: skip


def _own_unread(config: Config, own: dict[str, Any]) -> dict[str, tuple[Condition, Any]]:
    """The settings of this cell's strategy that it does not read, each with the condition that fails and the value there."""
    values = {f"{STRATEGY}{name}": config.strategy.get(name, setting.default) for name, setting in own.items()}
    conditions = {name: tuple(map(Condition.of, own[name].only)) for name in own}
    found = {name: reads.first_failing(name, conditions, values.__getitem__) for name in own}
    return {name: (condition, values[condition.key]) for name, condition in found.items() if condition is not None}


def _value(override: Override) -> Any:
    """The value as it was typed, a text without its quotes."""
    value = override.value()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else str(override.input_line).partition("=")[2]


def _typed(override: Override) -> str:
    return f"{override.key_or_group}={check.shown(_value(override))}"


def _one_sentence(error: Exception, overrides: list[Override]) -> ConfigError:
    """What Hydra and OmegaConf spread over several lines, in our own words where a value has the wrong type."""
    from omegaconf.errors import ConfigTypeError, ValidationError

    cause = error.__cause__ if error.__cause__ is not None else error
    given = {override.key_or_group: override for override in overrides}
    named = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    refers = next((key for key, override in given.items() if "${" in str(override.input_line)), "")
    name = str(named or refers).partition("[")[0]
    if name and isinstance(cause, ValidationError | ConfigTypeError):
        return grammar.wrong_type(name, str(_value(given[name])) if name in given else "(a file in configs/)")
    first = str(getattr(cause, "msg", None) or cause).strip().splitlines()[0].rstrip(".")
    return ConfigError(f"{name}: {first}" if name else first)

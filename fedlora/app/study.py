"""The folder of a sweep: its name, what says which sweep it is, and the cells that earlier commands left in it.

    sweep.json    the settings that all cells share, the names of those that are swept, and the folders of the cells
    table.csv     mean and 95 % interval over seeds, of all cells
    <cell>/       one folder a cell, named after what is swept

The same command finds its cells again. One with more values of what is swept adds cells. Any other sweep is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora import disk
from fedlora.app import folder, naming, report
from fedlora.app.folder import CONFIG, SUMMARY, SWEEP
from fedlora.app.records import Recorder, settings_of
from fedlora.app.sweep import Cell
from fedlora.check import ConfigError, RunError
from fedlora.config import Config
from fedlora.identity import flat, identifies

TABLE = "table.csv"
NO_PART = ("name", "results", "overwrite", "plan")  # of what names a sweep


@dataclass(frozen=True)
class Study:
    """A sweep's cells and their folder."""

    folder: Path
    cells: list[Config]
    named: bool  # whether the user names every cell, so that each has its place beside this folder

    @classmethod
    def of(cls, cells: Sequence[Config]) -> Study:
        """The cells of a command, each with its place: results/<the sweep>/<what is swept, then the rest>.

        Without `name=…` the sweep is named after all that differs from the defaults. Raises ConfigError for a name that
        leads out of `results`.
        """
        swept, names = _swept(cells), {cell.name for cell in cells}
        usual = naming.sweep_name(cells, swept)
        if len(names) > 1:
            together = naming.folder_name(",".join(naming.check_name(cell.name) for cell in cells if cell.name))
            return cls(Path(cells[0].results) / together, list(cells), True)
        name = usual if cells[0].name is None else naming.check_name(cells[0].name)
        identifying = [each for each in swept if identifies(each)]
        placed = [
            replace(cell, name=naming.run_name(cell, identifying), results=str(Path(cell.results) / name)) for cell in cells
        ]
        return cls(Path(cells[0].results) / name, placed, False)

    def check(self) -> None:
        """Raises ConfigError where the folder holds a run, or another sweep; changes nothing."""
        begins = f"name={self.folder.name}: {self.folder} holds"
        if not self.named and (self.folder / CONFIG).exists():
            raise ConfigError(f"{begins} a run and not a sweep; give the sweep another name by name=…")
        if self.cells[0].overwrite:
            return
        there = self._there()
        cure = "give the new sweep another name by name=…, or set overwrite=true to run it in place of that one"
        if not there and (self.folder / TABLE).exists():
            raise ConfigError(f"{begins} a sweep of an older version, which did not note its settings; {cure}")
        if not there:
            return
        shared, free = there["settings"], set(there["swept"])
        for cell in self.cells:
            own = _identity(cell)
            others = [name for name in sorted(shared) if name not in free and own.get(name) != shared[name]]
            if others:
                has, asked = (
                    ", ".join(naming.setting(name, known.get(name))[:120] for name in others[:4]) for known in (shared, own)
                )
                raise ConfigError(f"{begins} a sweep with other settings: it has {has}, and you ask for {asked}; {cure}")
        for config, _ in self.earlier():
            Recorder(config, launched=bool(config.deploy))  # of other data or code, it has no place in one table with these

    def write(self) -> None:
        """Note what the sweep is, its earlier cells with it. Raises RunError where that cannot be written."""
        there = {} if self.cells[0].overwrite else self._there()
        own = [_identity(cell) for cell in self.cells]  # settings of strategies that differ are not shared
        swept = list(dict.fromkeys([*there.get("swept", []), *filter(identifies, _swept(self.cells))]))
        content = {
            "settings": {
                name: value
                for name, value in own[0].items()
                if name not in swept and not (name.startswith("strategy.") and "strategy.name" in swept)
            },
            "swept": swept,
            "cells": list(dict.fromkeys([*there.get("cells", []), *map(str, map(self._place, self.cells))])),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.write(self.folder / SWEEP, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {self.folder / SWEEP} ({error.strerror}); the sweep stops here") from error

    def earlier(self) -> list[Cell]:
        """The cells of earlier commands that have ended, with their summaries; what cannot be read is left out."""
        own, found = set(map(self._place, self.cells)), []
        for place in map(Path, self._there().get("cells", [])):
            if place not in own and (cell := _read(self.folder / place)) is not None:
                found.append((replace(cell[0], name=str(place), results=str(self.folder), overwrite=False), cell[1]))
        return found

    def _place(self, cell: Config) -> Path:
        """Where a cell is, from the sweep's folder."""
        return Path("..", str(cell.name)) if self.named else Path(str(cell.name))

    def _there(self) -> dict[str, Any]:
        """What sweep.json says; empty where there is none. Raises ConfigError for a damaged one."""
        content = folder.read(self.folder / SWEEP)
        kinds = {"settings": dict, "swept": list, "cells": list}
        if content and not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
            raise folder.damaged(self.folder / SWEEP, "it is not what a sweep writes")
        return content


def _swept(cells: Sequence[Config]) -> list[str]:
    """The settings in which the cells differ, in the order of `--help`."""
    values = [flat(cell) for cell in cells]
    names = dict.fromkeys(name for own in values for name in own if name not in NO_PART)
    return [name for name in names if len({json.dumps(own[name]) for own in values if name in own}) > 1]


def _identity(cell: Config) -> dict[str, Any]:
    return {name: value for name, value in flat(cell).items() if identifies(name)}


def _read(place: Path) -> Cell | None:
    """A cell from its folder, if it has ended."""
    try:
        settings, summary = folder.read(place / CONFIG), folder.read(place / SUMMARY)
        config = settings_of(settings)
    except (ConfigError, TypeError, AttributeError, KeyError):
        return None
    return (config, summary) if folder.is_summary(summary) and summary["status"] != "interrupted" else None


def table(study: Study, done: Sequence[Cell]) -> None:
    """Mean and 95 % interval over seeds of every other setting, of all cells: on the terminal, and in the sweep's folder."""
    from fedlora.app import sweep, terminal

    cells = [*study.earlier(), *done]
    rows, path = sweep.over_seeds(cells), study.folder / TABLE
    terminal.sweep_table(rows)
    sweep.write_table(path, rows)
    terminal.say(f"written to {path}")
    if curves := sweep.frontier(cells):
        report.draw_frontier(path.with_name("frontier.png"), curves)
        terminal.say(f"accuracy against ε is drawn in {path.with_name('frontier.png')}")

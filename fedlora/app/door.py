"""What is looked at, for all cells of a command, before the first one begins and before anything heavy is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from fedlora import data, models
from fedlora.app import naming
from fedlora.app.records import Recorder
from fedlora.app.study import Study
from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.data import partition, resident


def ready(cells: Sequence[Config], study: Study | None = None) -> list[Recorder]:
    """A recorder for each cell, once all that can be known of all of them without a model has been looked at.

    Raises ConfigError, before any work and with no folder made, as `check_sources` and `check_folders` do, and where the
    sweep's folder holds another sweep or a run.
    """
    check_sources(cells)
    recorders = check_folders(cells)
    if study:
        study.check()
    return recorders


def check_sources(cells: Sequence[Config]) -> None:
    """Raises ConfigError where the data or the base model of any cell cannot be used, its examples not be dealt out, or its
    name is none.

    What is missing is said first, since to look for it takes no time. With deploy nothing is looked at: the server has it.
    """
    for cell in cells:
        if cell.name is not None:
            naming.check_name(cell.name)
    here = [cell for cell in cells if not cell.deploy]
    for cell in here:
        data.check_files(cell.dataset)
    for cell in here:
        models.digest(cell.model)
    parts = {json.dumps([asdict(part) for part in (c.dataset, c.partition)] + [c.clients], sort_keys=True): c for c in here}
    for _, cell in sorted(parts.items()):  # those of one dataset in a row
        examples = resident.dataset(cell.dataset, cell.seed).train
        partition.split(cell.partition, examples, cell.clients, cell.seed)


def check_folders(cells: Sequence[Config]) -> list[Recorder]:
    """A recorder for each cell. Raises ConfigError for a folder that holds another run or is wanted twice."""
    recorders = [Recorder(cell, launched=bool(cell.deploy)) for cell in cells]
    folder, times = Counter(recorder.folder for recorder in recorders).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{folder} would hold {times} cells of this sweep; sweep settings that change numbers, and give no name or one "
            "for each cell"
        )
    return recorders

"""Numbers worth keeping from one run to the next: JSON files in the cache folder ($FEDLORA_CACHE, else ~/.cache/fedlora).

A cache that cannot be read or written costs time, never a run.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path


def read(name: str) -> dict[str, float]:
    """What is kept under this name; nothing where the file is missing, damaged or not ours to read."""
    try:
        content = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, float) and 0 < value < math.inf}


def add(name: str, values: dict[str, float]) -> None:
    """Put these on disk in one move, with those that another process has added meanwhile."""
    try:
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False)  # noqa: SIM115
        try:
            with file:
                json.dump(read(name) | values, file, indent=0, sort_keys=True)
            os.replace(file.name, path)
        except OSError:  # a full disk, most likely
            os.unlink(file.name)
    except (OSError, RuntimeError):
        return


def _path(name: str) -> Path:
    return Path(os.environ.get("FEDLORA_CACHE") or Path.home() / ".cache" / "fedlora") / f"{name}.json"

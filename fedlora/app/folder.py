"""What may stand in a results folder: its names, and whether what was found under them can be taken for what it should be."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from fedlora.check import ConfigError

ROUNDS, SUMMARY, CONFIG, ENV, CURVES, PRIVACY, SUMS, LOCK = FILES = (
    "rounds.jsonl", "summary.json", "config.json", "env.json", "curves.png", "privacy.json", "sums.jsonl", ".lock"
)  # fmt: skip
SWEEP = "sweep.json"  # in a folder of runs: what the sweep is
DIGESTS = "digests"  # the key of config.json beside the settings, with the digests of what they name
ADAPTER, MERGED, CHECKPOINTS = FOLDERS = "adapter", "merged", "checkpoints"
# The numbers of a summary: those that every run has that did not fail, and those that may be null.
ALWAYS = ("clients", "rounds", "rounds_planned", "bytes_up", "bytes_down", "drops", "seconds", "seconds_to_first_round")
PERHAPS = (
    "accuracy", "loss", "macro_f1", "client_accuracy", "client_accuracy_worst_decile", "epsilon", "accuracy_before",
)  # fmt: skip


def refuse_strange(folder: Path) -> None:
    """Raises ConfigError where a name that a run writes stands for something else, such as a link to another folder."""
    for name in (*FILES, *FOLDERS):
        try:
            mode = (folder / name).lstat().st_mode
        except OSError:  # nothing there; what else is wrong with the folder is said when it is written
            continue
        if not (stat.S_ISDIR if name in FOLDERS else stat.S_ISREG)(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
            wanted = "folder" if name in FOLDERS else "file"
            raise ConfigError(f"{folder / name} is {what} and not a {wanted}; move it away, or choose another name")


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises ConfigError for anything else."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, getattr(error, "strerror", None) or str(error)) from error
    return content


def damaged(path: Path, why: str) -> ConfigError:
    """The error for a file that is not what was written."""
    return ConfigError(f"cannot read {path} ({why[:200]}); restore it, choose another name, or begin anew with overwrite=true")


def is_summary(content: dict[str, Any]) -> bool:
    """Whether this is what a run leaves when it ends, so that it may be shown."""
    status = content.get("status")
    if status == "failed":
        return isinstance(content.get("reason"), str)
    numbers = all(_is_number(content.get(name)) for name in ALWAYS if status == "finished" or content.get(name) is not None)
    tested = (content.get("accuracy") is None) == (content.get("accuracy_before") is None)
    texts = (content.get("strategy"), content.get("reason", ""), *_texts(content.get("notes", [])))
    return (
        status in ("finished", "interrupted")
        and content.keys() >= {*ALWAYS, *PERHAPS}
        and numbers
        and tested
        and all(content[name] is None or _is_number(content[name]) for name in PERHAPS)
        and all(isinstance(text, str) for text in texts)
    )


def _texts(notes: Any) -> list[Any]:
    return notes if isinstance(notes, list) else [None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18

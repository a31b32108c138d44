"""Which file a setting names, and its bytes; every fault of a path is one sentence with the setting and the cure."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedlora.check import ConfigError

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def locate(setting: str, name: str) -> Path:
    """The data file that `setting`=`name` names. Its contents are not read.

    Raises ConfigError where it is missing, unreadable, no regular file (a folder, a pipe), or has an ending that is not read.
    """
    source = f"{setting}={name}"
    if not name.strip():
        raise ConfigError(f"{source} names no file; give the path of a file that ends in one of: {', '.join(ENDINGS)}")
    try:
        path = Path(name).expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ConfigError(f"{source} does not exist (looked for {path.absolute()}); correct the path") from error
    except OSError as error:
        raise _unreadable(source, error) from error
    except (ValueError, RuntimeError) as error:  # a NUL or a lone surrogate in the name; ~name of nobody
        raise ConfigError(f"{setting}={name!r} is not a path ({error}); correct the path") from error
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{source} is a folder; name one file in it")
    if not stat.S_ISREG(mode):  # to read a pipe may wait for ever, and only one process could
        raise ConfigError(f"{source} is no regular file but a pipe or a device; save the data as a file and name that")
    ending = path.suffix.lower()
    if ending in PACKED:
        raise ConfigError(f"{source} ends in '{ending}', which is not unpacked here; unpack it and name the file inside")
    if ending not in ENDINGS:
        raise ConfigError(f"{source} ends in '{ending}', which is not known; use one of: {', '.join(ENDINGS)}")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{source} cannot be read (Permission denied); put its permissions or path right")
    return path


def locate_folder(setting: str, name: str) -> None:
    """Whether there is a folder where `setting`=`name` is written as a local path and not as `owner/name` of the hub.

    Raises ConfigError where there is none.
    """
    if name.startswith(("/", "./", "../", "~")):
        try:
            found = Path(name).expanduser().is_dir()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{setting}={name!r} is not a path ({error}); correct the path") from error
        if not found:
            raise ConfigError(f"{setting}={name} is not a folder; correct the path, or give the dataset's name on the hub")


def read(setting: str, name: str) -> tuple[Path, bytes]:
    """The file that `setting`=`name` names, and its contents. Raises ConfigError as `locate` does, and for an empty file."""
    path = locate(setting, name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(f"{setting}={name}", error) from error
    if not content.strip():
        raise ConfigError(f"{setting}={name} is empty; name a file that holds examples")
    return path, content


def _unreadable(source: str, error: OSError) -> ConfigError:
    return ConfigError(f"{source} cannot be read ({error.strerror}); put its permissions or path right")

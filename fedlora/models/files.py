"""The files of a checkpoint: where they are, which of them decide what the model is, and their digest. Loads no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from fedlora.check import ConfigError

ADAPTER = "adapter_config.json"  # by which a folder is one of PEFT's
_MATTERS = {".safetensors", ".bin", ".json", ".txt", ".model", ".vocab", ".codes", ".spm", ".tiktoken", ".jinja"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # "name" or "owner/name"


def digest(path: str) -> str:
    """SHA-256, in hexadecimal, of what a checkpoint is: a folder's files, or a hub name with its revision.

    For an adapter's folder that of its base model is part of it. Raises ConfigError where there is no such checkpoint.
    """
    found = hashlib.sha256()
    if not os.path.isdir(path):
        found.update(f"{path}@{revision(path)}".encode())
        return found.hexdigest()
    for file in matters(Path(path)):
        found.update(f"/{file.name}/{_file_digest(file)}/".encode())
    base = base_of(path)
    if base is not None:
        found.update(digest(base).encode())
    return found.hexdigest()


def matters(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer, sorted by name: what a model is. Raises ConfigError for a folder without any."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _MATTERS and file.is_file())
    if not files:
        raise ConfigError(f"model.path={folder} is a folder without a model; it needs config.json and model.safetensors")
    return files


def base_of(path: str) -> str | None:
    """The base model that an adapter's folder names; None for a folder of another kind, or a hub name.

    A base that is not found from here is looked for beside the adapter. Raises ConfigError where it names none.
    """
    file = Path(path, ADAPTER)
    if not file.is_file():
        return None
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError):
        named = None
    if not named or not isinstance(named, str):
        raise ConfigError(
            f"model.path={path} is an adapter, and its {ADAPTER} names no base model; write base_model_name_or_path"
        )
    beside = Path(path, named)
    return str(beside) if not os.path.isdir(named) and beside.is_dir() else named


def revision(path: str) -> str:
    """The commit of a hub name: the one that the cache has, else the newest. Raises ConfigError where there is none."""
    if not _HUB_NAME.fullmatch(path):
        raise ConfigError(f"model.path={path} is no folder here; check the path")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        for name in ("config.json", ADAPTER):
            if isinstance(cached := try_to_load_from_cache(path, name), str):
                return _commit(cached)
        return _commit(hf_hub_download(path, "config.json"))
    except (OSError, ValueError) as error:
        raise missing(path, error) from error


def missing(path: str, error: Exception) -> ConfigError:
    """What there is to say about a name that is no folder and that the hub does not give."""
    return ConfigError(
        f"model.path={path} is neither a local folder nor a model that the hub gives "
        f"({type(error).__name__}); check the spelling, or the network"
    )


def _commit(cached: str) -> str:
    """The commit of a file of the hub's cache, …/snapshots/<commit>/<file>."""
    return Path(cached).parent.name


def _file_digest(file: Path) -> str:
    """The digest of a file's bytes, read once a process as long as the file stays as it is."""
    try:
        state = file.stat()
        return _read(str(file.resolve()), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error.strerror}); check its permissions") from error


@lru_cache(maxsize=4096)
def _read(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

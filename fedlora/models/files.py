"""The files of a checkpoint: where they are, which of them decide what the model is, and their digest. Loads no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.check import ConfigError

ADAPTER = "adapter_config.json"  # by which a folder is one of PEFT's
_MATTERS = {".safetensors", ".bin", ".json", ".txt", ".model", ".vocab", ".codes", ".spm", ".tiktoken", ".jinja"}
_FIRST = (ADAPTER, "config.json")  # the files by which a hub name is known
_POINTER = b"version https://git-lfs"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # "name" or "owner/name"


def digest(path: str) -> str:
    """SHA-256, in hexadecimal, of what a checkpoint is: a folder's files, or a hub name with its revision.

    For an adapter's folder that of its base model is part of it. Raises ConfigError where there is no such checkpoint.
    """
    found = hashlib.sha256()
    if os.path.isdir(path):
        for file in sound(Path(path)):
            found.update(f"/{file.name}/{digest_of(file)}/".encode())
    else:
        found.update(f"{path}@{revision(path)}".encode())
    base = base_of(path)
    if base is not None:
        found.update(digest(base).encode())
    return found.hexdigest()


def digest_of(file: Path) -> str:
    """SHA-256, in hexadecimal, of a file's bytes, read once a process as long as the file stays as it is."""
    with _opened(file):
        state = file.stat()
        return _read(str(file.resolve()), state.st_size, state.st_mtime_ns)


def sound(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer, sorted by name: what a model is.

    Raises ConfigError for a folder without any, and for a file that is cut off or stands for one that was not fetched.
    """
    found = sorted(file for file in folder.iterdir() if file.suffix in _MATTERS and file.is_file())
    if not found:
        raise ConfigError(f"model.path={folder} is a folder without a model; it needs config.json and model.safetensors")
    for file in found:
        if _begins_with(file, _POINTER):
            raise ConfigError(f"model.path: {file} is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`")
        if file.suffix == ".safetensors":
            _whole(file)
    return found


def has(path: str, names: Collection[str], at: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has one of these files: in its folder, or in the cache of the hub for the revision `at`."""
    if os.path.isdir(path):
        return any(Path(path, name).is_file() for name in names)
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(path, name, **at), str) for name in names)


def at(path: str) -> dict[str, Any]:
    """The revision that the hub is to be asked for, so that what is loaded is what the digest says; none for a folder."""
    return {} if os.path.isdir(path) else {"revision": revision(path)}


def base_of(path: str) -> str | None:
    """The base model that an adapter names, in a folder or on the hub; None for a checkpoint of another kind.

    A base that is not found from here is looked for beside the adapter. Raises ConfigError where it names none.
    """
    file: Any = os.path.join(path, ADAPTER)
    if not os.path.isdir(path):
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(path, ADAPTER, revision=revision(path))
    if not isinstance(file, str) or not os.path.isfile(file):
        return None
    try:
        named = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
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
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        for name in _FIRST:
            if isinstance(cached := try_to_load_from_cache(path, name), str):
                return _commit(cached)
        for name in _FIRST:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return _commit(hf_hub_download(path, name))
        raise FileNotFoundError(f"{path} has no config.json")
    except (OSError, ValueError) as error:
        raise missing(path, error) from error


def missing(path: str, error: Exception) -> ConfigError:
    """What there is to say about a name that is no folder and that the hub does not give."""
    return ConfigError(
        f"model.path={path} is neither a local folder nor a model that the hub gives "
        f"({type(error).__name__}); check the spelling, or the network"
    )


def _begins_with(file: Path, start: bytes) -> bool:
    with _opened(file), open(file, "rb") as stream:
        return stream.read(len(start)) == start


def _whole(file: Path) -> None:
    """Raises ConfigError for weights that are cut off or damaged; reads their header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with _opened(file), safe_open(file, "numpy"):
            pass
    except SafetensorError as error:
        raise ConfigError(f"model.path: {file} is cut off or damaged ({error}); fetch or save it again") from error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"model.path: {file} cannot be read ({error.strerror or error}); check its permissions") from error


def _commit(cached: str) -> str:
    """The commit of a file of the hub's cache, …/snapshots/<commit>/<file>."""
    return Path(cached).parent.name


@lru_cache(maxsize=4096)
def _read(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

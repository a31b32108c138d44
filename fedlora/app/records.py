"""The results folder: what is written, when, and what may be overwritten.

    config.json     the resolved settings, and      summary.json    the outcome, written last
                    digests of what they name
    env.json        versions, commit, hardware      curves.png      the plot of rounds.jsonl
    rounds.jsonl    a line a round, as it happens   adapter/        the merged adapter in PEFT's own format
    privacy.json    the ledger, written ahead of every round (privacy=record)
    checkpoints/    what a run that is broken off goes on from; gone when it has finished
    merged/         the base model with it merged in, with save_merged=true
    .lock           held by the process that runs here, as long as it does

A finished folder is never written over in silence: the same settings again show what is there, and other settings under
the same name are refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora import disk
from fedlora.app import folder, naming
from fedlora.app.claim import Claim
from fedlora.app.environment import environment
from fedlora.app.folder import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    DIGESTS,
    ENV,
    FOLDERS,
    LOCK,
    MERGED,
    PRIVACY,
    ROUNDS,
    SUMMARY,
    SWEEP,
)
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, from_dict
from fedlora.identity import flat, identifies, resolved, sources

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none
PATIENCE = 5.0  # seconds for a run that was killed: the workers in which its cells are end some time after it


class Recorder:
    """Writes one run's results folder, each file whole or not at all."""

    def __init__(self, config: Config, launched: bool = False) -> None:
        """Checks the folder and changes nothing. Raises ConfigError where it holds another run, or cannot be read.

        `launched`: this process does not run the experiment but has it run on real devices, by a server that has its data.
        """
        self.config, self.launched = config, launched
        self.folder = Path(config.results) / naming.name_of(config)
        self._length, self._digest = 0, hashlib.sha256()  # of rounds.jsonl
        self._lock: disk.Lock | None = None
        folder.refuse_strange(self.folder)
        if os.path.exists(self.folder / SWEEP):  # False for a name that no file can have
            raise ConfigError(f"name={self.folder.name}: {self.folder} holds a sweep and not a run; give the run another name")
        self.refuse_others(self._read(CONFIG))

    @cached_property
    def digests(self) -> dict[str, str]:
        """What `identity.sources` says of the run that is to stand here. Raises ConfigError for what cannot be read."""
        return sources(self.config, self.launched)

    @property
    def finished(self) -> bool:
        """Whether the run that stands in the folder is to stand there, and complete."""
        return not self.config.overwrite and self.summary().get("status") == "finished"

    def refuse_others(self, there: dict[str, Any]) -> None:
        """Raises ConfigError, with the difference, where the run that is there is another one than this.

        `there` is what its config.json or its checkpoint says: other settings, other data, another base model or other code.
        """
        if not there or self.config.overwrite:
            return
        begins = f"name={self.folder.name}: {self.folder} holds a run"
        cure = "give the new run another name by name=…, or set overwrite=true to run it in place of that one"
        if difference := self._difference(there):
            raise ConfigError(f"{begins} {difference}; {cure}")
        known = there.get(DIGESTS)
        if not isinstance(known, dict) or not self.digests.keys() <= known.keys():
            raise ConfigError(
                f"{begins} of an older version, which did not note its data, base model and strategy code, so that nobody "
                f"knows whether they are the same; {cure}"
            )
        if others := [what for what, digest in self.digests.items() if known[what] != digest]:
            has = "has" if len(others) == 1 else "have"
            raise ConfigError(f"{begins} with these settings, but the {' and the '.join(others)} {has} changed since; {cure}")

    def summary(self) -> dict[str, Any]:
        """The summary of the run that stands in the folder; empty if none has ended there. Raises ConfigError for damage."""
        summary = self._read(SUMMARY)
        if summary and not folder.is_summary(summary):
            raise folder.damaged(self.folder / SUMMARY, "it is not what a run writes")
        return summary

    def rounds(self) -> int:
        """Rounds that are on disk, so that a run in another process can be followed."""
        try:
            return max(0, (self.folder / ROUNDS).read_bytes().count(b"\n") - 1)  # the first line is round 0
        except OSError:
            return 0

    def claim(self, patience: float = PATIENCE) -> Claim:
        """Make the folder and try it, before any time is spent; while the context lasts, no other process can.

        Raises ConfigError if it cannot be written, or another process still runs there after `patience` seconds.
        """
        claimed = Claim(self.folder)
        tried = self.folder
        try:
            tried.mkdir(parents=True, exist_ok=True)
            folder.refuse_strange(self.folder)
            for tried in (self.folder, *(self.folder / name for name in FOLDERS if (self.folder / name).exists())):
                with tempfile.TemporaryFile(dir=tried) as file:
                    file.write(b" ")
                    file.flush()
            self._lock = claimed.lock = self._locked(patience)
            self.refuse_others(self._read(CONFIG))  # whoever had it until now may have written since
        except OSError as error:
            claimed.close()
            raise ConfigError(
                f"results={self.config.results}: cannot write {tried} ({error.strerror}); choose another folder"
            ) from error
        except ConfigError:
            claimed.close()
            raise
        return claimed

    def _locked(self, patience: float) -> disk.Lock | None:
        """The lock; None where the file system has none, so that nobody watches over the folder."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return disk.lock(self.folder / LOCK)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"name={self.folder.name}: another process runs in {self.folder}; wait for its end, stop it, or "
                        "choose another name"
                    ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return None
            time.sleep(0.1)

    def still_ours(self) -> None:
        """To be called before a round is written. Raises RunError where another process may have the folder by now."""
        if self._lock is not None and not self._lock.held:
            raise RunError(
                f"{self.folder} or its {LOCK} was removed or replaced while the run went on, so that another one may write "
                "there; the run stops here"
            )

    def begin(self, history: int = 0) -> None:
        """Clear what an earlier run left after so many bytes of rounds.jsonl, and write config.json and env.json.

        What its clients have spent stays counted, unless it is to be overwritten: the same rounds will be taken again.
        """
        anew = (CHECKPOINTS, PRIVACY) if self.config.overwrite else ()
        self._length, self._digest = history, hashlib.sha256()
        try:
            for name in (SUMMARY, *anew, CURVES, ADAPTER, MERGED):  # the mark of a finished run goes first
                disk.remove(self.folder / name)
            if history:
                os.truncate(self.folder / ROUNDS, history)
                self._digest.update((self.folder / ROUNDS).read_bytes())
            else:
                disk.remove(self.folder / ROUNDS)
        except OSError as error:
            raise self._full(Path(error.filename or ROUNDS).name, error) from error
        self.write(CONFIG, self.identity)
        self.write(ENV, environment())

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is, for config.json and checkpoints: every setting, and the digests of what they name."""
        return resolved(self.config) | {DIGESTS: self.digests}

    def round(self, row: dict[str, Any]) -> None:
        """Append one round to rounds.jsonl, on disk when this returns."""
        line = (json.dumps(_strict(row)) + "\n").encode()
        self.still_ours()
        try:
            with open(self.folder / ROUNDS, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._full(ROUNDS, error) from error
        self._length += len(line)
        self._digest.update(line)

    def spend(self, ledger: Any) -> None:
        """Save the ledger of a private run, on disk when this returns."""
        self.still_ours()
        ledger.save(self.folder / PRIVACY)

    def history(self) -> tuple[int, str]:
        """What stands in rounds.jsonl since `begin`: how many bytes, and their digest, as in `checkpoint.history`."""
        return self._length, self._digest.hexdigest()

    def close(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the mark of a run that has ended; a run that has finished needs its checkpoints no more."""
        self.write(SUMMARY, _strict(summary))
        if summary["status"] == "finished":
            disk.remove(self.folder / CHECKPOINTS)

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` make a file or a folder, and put it under its name only when it is whole."""
        temporary, final = self.folder / f".{name}.tmp", self.folder / name
        disk.remove(temporary)
        try:
            write(temporary)
            disk.remove(final)
            temporary.replace(final)
        except KeyboardInterrupt:
            disk.remove(temporary)
            raise
        except (OSError, SafetensorError) as error:
            disk.remove(temporary)
            raise self._full(name, error) from error

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole and on disk when this returns."""
        self.put(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def put(self, name: str, content: bytes) -> None:
        """Write a file, by its path in the folder, whole and on disk when this returns."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write(path, content)
        except OSError as error:
            raise self._full(name, error) from error

    def _full(self, name: str, error: Exception) -> RunError:
        reason = getattr(error, "strerror", None) or str(error)
        return RunError(f"results={self.config.results}: cannot write {self.folder / name} ({reason}); the run stops here")

    def _read(self, name: str) -> dict[str, Any]:
        """What stands in a JSON file; empty if there is none. Damage is an error, unless all is to be overwritten."""
        try:
            return folder.read(self.folder / name)
        except ConfigError:
            if not self.config.overwrite:
                raise
            return {}

    def _difference(self, there: dict[str, Any]) -> str:
        """'with other settings: it has rounds=30, and you ask for rounds=20'; '' where no setting is another."""
        try:
            old = flat(settings_of(there))
        except (ConfigError, TypeError, AttributeError, KeyError):
            return "that was made by another version of fedlora, or whose config.json is damaged"
        new = flat(self.config)
        keys = [key for key in sorted(old | new) if identifies(key) and old.get(key) != new.get(key)]
        if not keys:
            return ""
        has, asked = (", ".join(f"{naming.setting(key, own.get(key)):.120}" for key in keys[:4]) for own in (old, new))
        more = f" (and {len(keys) - 4} more differ)" if len(keys) > 4 else ""
        return f"with other settings: it has {has}, and you ask for {asked}{more}"


def settings_of(there: dict[str, Any]) -> Config:
    """The settings in a run's config.json, not checked. Raises ConfigError, or as Python does, for anything else."""
    return from_dict({name: value for name, value in there.items() if name != DIGESTS})


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for what JSON cannot say: an infinite ε, a loss that is not a number."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}

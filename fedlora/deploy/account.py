"""What a device has spent of its privacy, and the seed of its noise: both its own, on its own disk.

    secret          32 random bytes from the operating system, hexadecimal; made once, read by its owner only
    ledger.jsonl    a line for each round, on disk before the round's training begins

The number of lines is the number of the next round's stream of noise, so that no stream is ever used twice: not when the
server sends a round again, not in another run, not after a kill.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import disk
from fedlora.check import ConfigError, RunError
from fedlora.privacy.ledger import Ledger

SECRET, LEDGER, LOCK = "secret", "ledger.jsonl", "lock"
SIGMA, RATE, STEPS = "noise_multiplier", "sampling_rate", "steps"


@dataclass(frozen=True)
class Limits:
    """What a device's owner allows, whatever a server asks for."""

    epsilon: float  # for everything that the device ever takes part in; inf: no privacy is demanded
    delta: float
    clip: float  # the largest bound on one record's gradient
    steps: int  # local steps in a round, at most


class Account:
    """The books of one device. One process at a time: a second one raises ConfigError."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Opens the folder, made where it is missing. Raises ConfigError where what was spent cannot be known."""
        self.folder, self.limits = folder, limits
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked(folder / LOCK)
            self.secret = _secret(folder / SECRET)
            self.rows = _rows(folder / LEDGER)
        except OSError as error:
            raise ConfigError(f"--state {folder} cannot be used ({error.strerror}); choose another folder") from error
        self.ledger = Ledger()
        for row in self.rows:
            self.ledger.spend(0, row[SIGMA], row[RATE], row[STEPS])

    @property
    def spent(self) -> float:
        """ε of all rounds so far, at the device's own δ."""
        return self.ledger.epsilon(0, self.limits.delta)

    def after(self, sigma: float, rate: float, steps: int) -> float:
        """ε with so many steps more."""
        return self.ledger.after(0, sigma, rate, steps).epsilon(0, self.limits.delta)

    def admit(self, about: dict[str, Any], sigma: float, rate: float, steps: int) -> int:
        """The number of a noisy round that may begin: its line, with what it is `about`, is on disk when this returns.

        Raises RunError, and writes nothing, where it would go beyond the limits.
        """
        limits = self.limits
        if self.ledger.would_exceed(0, sigma, rate, steps, limits.epsilon, limits.delta):
            raise RunError(
                f"this device has spent ε = {self.spent:.4g} at δ = {limits.delta:g}, and {steps} steps with σ = {sigma:.4g} "
                f"would take it above its own budget of {limits.epsilon:g}"
            )
        row = {"number": len(self.rows) + 1, SIGMA: sigma, RATE: rate, STEPS: steps} | about
        _append(self.folder / LEDGER, row)
        self.rows.append(row)
        self.ledger.spend(0, sigma, rate, steps)
        return len(self.rows)

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()


def _locked(path: Path) -> disk.Lock:
    try:
        return disk.lock(path)
    except BlockingIOError as error:
        raise ConfigError(f"--state {path.parent} is used by another fedlora-client; stop it, or choose another") from error


def _secret(path: Path) -> str:
    if not path.exists():
        disk.write(path, f"{secrets.token_hex(32)}\n".encode(), mode=0o600)
    text = path.read_text(encoding="utf-8").strip()
    if len(text) != 64 or any(c not in "0123456789abcdef" for c in text):
        raise ConfigError(f"{path} is not a seed of 32 bytes in hexadecimal; restore it, or start a new state folder")
    return text


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of the ledger. A last one that was cut off is removed: the round that it stands for never began."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            Ledger().spend(0, row[SIGMA], row[RATE], row[STEPS])
            if row["number"] != number:
                raise ValueError(f"its number is {row['number']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged in line {number} ({error}), so what was spent is unknown; restore the file"
            ) from error
        rows.append(row)
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row["number"] == 1:  # the name of a new file is on disk with its folder
            disk.flush_names(path.parent)
    except OSError as error:
        raise RunError(f"cannot write the privacy ledger {path} ({error.strerror}), so this device does not train") from error

"""What a device has spent of its privacy, and the secret of its noise: both its own, on its own disk.

    secret          32 random bytes from the operating system, hexadecimal; made once, read by its owner only
    ledger.jsonl    a line for each piece of work, on disk before the work begins

The key of a training's noise and batches comes from the secret and from fresh bytes of the operating system that are kept
nowhere. So no key comes twice: not when the server sends a round again, not after a kill, not from a folder that was
restored from a backup, and not on two machines with copies of one folder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora import disk
from fedlora.check import ConfigError
from fedlora.deploy import folder as folders
from fedlora.deploy.book import Book
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason, Refused
from fedlora.privacy.ledger import Ledger

SECRET, LEDGER, LOCK = "secret", "ledger.jsonl", "lock"
SIGMA, RATE, STEPS = "noise_multiplier", "sampling_rate", "steps"
KEY, DRAW = 32, 16  # bytes of a training's key, and of its public name
TRAIN, EVALUATE = "train", "evaluate"


@dataclass(frozen=True)
class Work:
    """A piece of work that a server asks for."""

    kind: str  # TRAIN or EVALUATE
    experiment: str  # its name, the same wherever the server goes on with it
    round: int
    about: dict[str, Any] = field(default_factory=dict)  # what else its line in the ledger says
    most: int | None = None  # trainings of the experiment `about["asked"]`, at most; None: any number


@dataclass(frozen=True)
class Permit:
    """Work that is in the ledger. `Account.admit` alone makes one, and nothing is done without."""

    work: Work
    key: bytes | None = field(repr=False)  # 32 bytes that this training's randomness comes from; None: work without privacy


class Account:
    """The books of one device. One process at a time: a second one raises ConfigError.

    `random(n)` gives n bytes that nobody can foretell, and is the operating system's anywhere but in a test.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        say: Callable[[str], object] = print,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Opens the folder, made where it is missing. Raises ConfigError where what was spent cannot be known."""
        self.folder, self.limits, self.random = folder, limits, random
        self.in_force: Permit | None = None  # the newest
        try:
            folders.private(folder, say)
            self._lock = _locked(folder / LOCK)
        except OSError as error:
            raise _unusable(folder, error) from error
        try:
            self.secret = _secret(folder / SECRET)
            self._book = _opened(folder / LEDGER)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _unusable(folder, error) from error
            raise
        self.ledger = Ledger()
        for row in self.rows:
            self.ledger.spend(0, row[SIGMA], row[RATE], row[STEPS])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of the ledger."""
        return self._book.rows

    @property
    def spent(self) -> float:
        """ε of all rounds so far, at the device's own δ and adjacency; inf where it has ever worked without noise."""
        return self.ledger.epsilon(0, self.limits.delta, adjacency=self.limits.adjacency)

    def after(self, sigma: float, rate: float, steps: int) -> float:
        """ε with so many steps more."""
        return self.ledger.after(0, sigma, rate, steps).epsilon(0, self.limits.delta, adjacency=self.limits.adjacency)

    def admit(self, work: Work, sigma: float | None, rate: float, steps: int) -> Permit:
        """The permit for `steps` steps with noise σ = `sigma` at sampling rate `rate`; None: without privacy.

        When this returns, the line is on disk, and the permit is the one in force. Raises Refused, and writes nothing, where
        it would go beyond the budget or where the line cannot be written.
        """
        self.in_force = None
        limits, asked, noise = self.limits, work.about.get("asked"), sigma or 0.0
        trainings = [row for row in self.rows if row.get("kind") == TRAIN and row.get("asked") == asked]
        if work.most is not None and len(trainings) >= work.most:
            raise Refused(Reason.SPENT, f"this device has trained {work.most} times for the experiment that was agreed to")
        budget = limits.epsilon, limits.delta
        if self.ledger.would_exceed(0, noise, rate, steps, *budget, adjacency=limits.adjacency):
            raise Refused(
                Reason.SPENT,
                f"this device has spent ε = {self.spent:.4g} at δ = {limits.delta:g}, and {steps} steps with σ = {noise:.4g} "
                f"would take it above its own budget of {limits.epsilon:g}",
            )
        number = len(self.rows) + 1
        key, draw = self._draw(number)
        row = {"number": number, SIGMA: noise, RATE: rate, STEPS: steps, "kind": work.kind, "round": work.round, "draw": draw}
        try:
            self._book.append(row | work.about)
        except OSError as error:
            reason = f"cannot write the privacy ledger {self._book.path} ({error.strerror}), so this device does not train"
            raise Refused(Reason.FAILED, reason) from error
        self.ledger.spend(0, noise, rate, steps)
        self.in_force = Permit(work, None if sigma is None else key)
        return self.in_force

    def ensure(self, permit: Permit) -> None:
        """Raises Refused for any permit but the newest."""
        if permit is not self.in_force:
            raise Refused(Reason.OUT_OF_TURN, "work without the permit that is in force")

    def _draw(self, number: int) -> tuple[bytes, str]:
        """(key, public name) of line `number`. The name tells nothing of the key: they are separate output of HKDF."""
        about = f"fedlora/device/draw/{number}".encode()
        made = HKDF(SHA256(), KEY + DRAW, salt=self.random(KEY), info=about).derive(bytes.fromhex(self.secret))
        return made[:KEY], made[KEY:].hex()

    def close(self) -> None:
        """Lets another process have the folder."""
        self._lock.close()


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--state {folder} cannot be used ({error.strerror}); choose another folder")


def _locked(path: Path) -> disk.Lock:
    try:
        path.touch(mode=0o600)
        return disk.lock(path)
    except BlockingIOError as error:
        raise ConfigError(f"--state {path.parent} is used by another fedlora-client; stop it, or choose another") from error


def _secret(path: Path) -> str:
    if not path.exists():
        disk.write(path, f"{secrets.token_hex(32)}\n".encode(), mode=0o600)
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if len(text) != 64 or any(c not in "0123456789abcdef" for c in text):
        raise ConfigError(f"{path} is not a secret of 32 bytes in hexadecimal; restore it, or start a new state folder")
    return text


def _opened(path: Path) -> Book:
    try:
        book = Book(path)
        for number, row in enumerate(book.rows, start=1):
            try:
                Ledger().spend(0, row[SIGMA], row[RATE], row[STEPS])
                if row["number"] != number:
                    raise ValueError(f"its number is {row['number']}")
            except (ValueError, KeyError, TypeError, ArithmeticError) as error:
                raise ValueError(f"line {number} ({str(error)[:200]})") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged in {error}, so what was spent is unknown; restore the file") from error
    return book

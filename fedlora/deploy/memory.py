"""What a device keeps for itself from one round to the next, on its own disk: personal adapters, what compression has lost.

    kept/<experiment>/round-00012    what its client kept after round 12, behind a digest of it; read by its owner only

A server that was broken off goes back to a checkpoint and asks for the rounds since then again, under a new Flower run. So a
round begins with the newest that was kept before it, and as much is kept as a server may go back.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from flwr.app import RecordDict

from fedlora import disk
from fedlora.arrays import messages
from fedlora.check import RunError

KEPT = "kept"
EXPERIMENTS = 8  # that something is kept of: those that trained last, since a device is not told that one is over
ROUNDS = 100  # of an experiment, the newest, however far a server says that it may go back
DIGEST = hashlib.sha256().digest_size


class Memory:
    """What one device keeps, by experiment and round."""

    def __init__(self, folder: Path, say: Callable[[str], object] = print) -> None:
        self.folder, self.say = folder / KEPT, say

    def newest(self, experiment: str, round: int) -> RecordDict:
        """What was kept after the newest round up to this one; empty where nothing was.

        A file that is damaged is named and removed, and the one before it taken.
        """
        for number, path in sorted(self._files(experiment).items(), reverse=True):
            if number > round:
                continue
            try:
                return _read(path)
            except (OSError, ValueError) as reason:
                self.say(f"{path} is damaged and is not used ({reason}); the state of round {number} on this device is lost")
                disk.remove(path)
        return RecordDict()

    def keep(self, experiment: str, round: int, state: RecordDict, back: int) -> None:
        """Put on disk what a round has left, if anything.

        Of later rounds, which the server has gone back before, nothing stays; of earlier ones what is needed where it goes
        back to the end of round `back`, `ROUNDS` at most. Raises RunError where it cannot be written.
        """
        files = self._files(experiment)
        try:
            if state:
                content, path = messages.to_bytes(state), self._path(experiment, round)
                for folder in (self.folder, path.parent):
                    folder.mkdir(exist_ok=True, mode=0o700)
                disk.write(path, hashlib.sha256(content).digest() + content, mode=0o600)
                files[round] = path
            oldest = max((number for number in files if number <= back), default=0)
            newest = sorted(number for number in files if number <= round)[-ROUNDS:]
            for number, path in files.items():
                if number not in newest or number < oldest:
                    disk.remove(path)
            others = [folder for folder in self.folder.glob("*/") if folder.name != experiment]
            for folder in sorted(others, key=lambda folder: -folder.stat().st_mtime)[EXPERIMENTS - 1 :]:
                shutil.rmtree(folder)
        except OSError as error:
            raise RunError(f"cannot write what this device keeps to {self.folder} ({error.strerror})") from error

    def _path(self, experiment: str, round: int) -> Path:
        return self.folder / experiment / f"round-{round:05d}"

    def _files(self, experiment: str) -> dict[int, Path]:
        files = ((path.name.removeprefix("round-"), path) for path in (self.folder / experiment).glob("round-*"))
        return {int(number): path for number, path in files if number.isascii() and number.isdecimal()}


def _read(path: Path) -> RecordDict:
    """Raises OSError or ValueError for a file that is not whole."""
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        raise ValueError("its digest is another one")
    return messages.from_bytes(content[DIGEST:])

"""What a run that was broken off goes on from: all of a round's end that neither the settings nor the seed give.

    checkpoints/round-00012.safetensors     arrays: the server's state, and what each client keeps, as far as it has changed
                                            since the last one; the files of earlier rounds that have the rest stay
                                            metadata: the rest as one line of JSON, and a digest of everything
    checkpoints/released.json               a private simulation: which state each round left, by digest

Random streams need no place in it, for they follow from the seed, the purpose, the client and the round. Neither do the
lines of rounds.jsonl: a checkpoint knows how long the file was, and by a digest what was in it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from safetensors import SafetensorError, numpy, safe_open

from fedlora import disk
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState
from fedlora.check import ConfigError, RunError
from fedlora.config import CheckpointConfig

VERSION, RELEASED = 2, "released.json"  # of the files
SERVER, EXTRA, CLIENT = "server/", "extra/", "client/"  # what names of arrays begin with


@dataclass
class Checkpoint:
    """A run at the end of a round."""

    round: int
    settings: dict[str, Any]
    state: ServerState
    clients: dict[int, RecordDict]  # what each keeps (`Context.state`), by node
    guard: dict[str, Any]  # the memory of what keeps the budget; empty without privacy
    history: tuple[int, str]  # bytes of rounds.jsonl and their digest
    resumed: list[int] = field(default_factory=list)  # rounds after which the run was continued before
    lineage: str = ""  # what this run and all that went on from it have in common, and no other
    elsewhere: dict[int, int] = field(default_factory=dict)  # clients whose state is in the file of an earlier round, and which
    cohorts: dict[str, int] = field(default_factory=dict)  # clients that share a pass, by what they train; empty: not settled

    @property
    def digest(self) -> str:
        """What `Released` knows the state by."""
        return digest_of(self.state)

    def to_bytes(self) -> bytes:
        """The file."""
        state = self.state
        parts = {SERVER: messages.named(state.adapters, state.dense, "AB", state.base_correction), EXTRA: state.extra}
        arrays = {prefix + name: np.asarray(array, order="C") for prefix, part in parts.items() for name, array in part.items()}
        for node, kept in self.clients.items():
            arrays[f"{CLIENT}{node}"] = np.frombuffer(messages.to_bytes(kept), np.uint8)
        rest = {key: value for key, value in vars(self).items() if key not in ("state", "clients")}
        text = json.dumps({"version": VERSION, "scale": state.scale} | rest)
        return numpy.save(arrays, {"checkpoint": text, "digest": messages.digest(arrays, text)})

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """The inverse of `to_bytes`. Raises ValueError, with the reason, for a file that is not whole or of another version."""
        try:
            with safe_open(path, framework="np") as file:
                metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = metadata["checkpoint"]
            if messages.digest(arrays, text) != metadata["digest"]:
                raise ValueError("its digest is another one")
            rest = json.loads(text)
            if rest.pop("version") != VERSION:
                raise ValueError("it was written by another version of fedlora")
            server = messages.sort(_under(SERVER, arrays))
            adapters = {layer: Pair(**both) for layer, both in server.factors.items()}
            state = ServerState(adapters, server.dense, server.correction, rest.pop("scale"), _under(EXTRA, arrays))
            clients = {int(node): messages.from_bytes(array.tobytes()) for node, array in _under(CLIENT, arrays).items()}
            elsewhere = {int(node): round for node, round in rest["elsewhere"].items()}
            return cls(**rest | {"state": state, "clients": clients, "history": tuple(rest["history"]), "elsewhere": elsewhere})
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


class Checkpoints:
    """The checkpoints of one run, in their folder."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.resumed: list[int] = []  # rounds after which this run was continued, each once
        self.lineage = secrets.token_hex(8)
        self._kept: dict[int, tuple[RecordDict, bytes, int]] = {}  # clients' states on disk, their digests, rounds of the files
        self._uses: dict[int, set[int]] = {}  # rounds of checkpoints that are kept, and of the files that they need

    def due(self, round: int, rounds: int) -> bool:
        """Whether there is to be one after this round: before the first, every so many, and after the last."""
        return self.config.every > 0 and (round % self.config.every == 0 or round == rounds)

    def save(self, checkpoint: Checkpoint) -> None:
        """Put it on disk, and let go of the oldest. Raises RunError where it cannot be written.

        States of clients that have not changed since are left in the files in which they are; those files stay.
        """
        path, round = self._path(checkpoint.round), checkpoint.round
        states: dict[int, tuple[RecordDict, bytes, int]] = {}
        for node, kept in checkpoint.clients.items():
            old, digest, where = self._kept.get(node, (None, b"", round))
            if kept is not old and (now := _digest(kept)) != digest:  # every reply brings a new one, which may say the same
                digest, where = now, round
            states[node] = kept, digest, where
        own = {node: kept for node, (kept, _, where) in states.items() if where == round}
        elsewhere = {node: where for node, (_, _, where) in states.items() if where != round}
        try:
            self.folder.mkdir(exist_ok=True)
            written = replace(checkpoint, clients=own, elsewhere=elsewhere, resumed=self.resumed, lineage=self.lineage)
            disk.write(path, written.to_bytes())
            self._kept = states
            self._uses[round] = {round, *elsewhere.values()}
            self._uses = {round: self._uses[round] for round in sorted(self._uses)[-self.config.keep :]}
            needed = {self._path(each) for each in set().union(*self._uses.values())}
            for other in self._files():
                if other not in needed:
                    other.unlink()
        except OSError as error:
            raise RunError(f"cannot write the checkpoint {path} ({error.strerror}); the run stops here") from error

    def newest(self, rounds: Path, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest that is whole and whose lines stand in the file `rounds`; what is wrong with a newer one is said.

        Newer ones are removed, so that they are not taken for those of the rounds to come. Raises ConfigError for one that
        this process may not read or remove.
        """
        try:
            return self._newest(rounds, say)
        except OSError as error:
            raise ConfigError(
                f"cannot use {error.filename or self.folder} ({error.strerror}); make it readable, or begin anew with "
                "overwrite=true"
            ) from error

    def _newest(self, rounds: Path, say: Callable[[str], None]) -> Checkpoint | None:
        for path in reversed(self._files()):
            path.open("rb").close()  # what cannot be read need not be damaged
            try:
                found = self._load(path)
                if path != self._path(found.round):
                    raise ValueError(f"it is that of round {found.round}")
                if found.history != history(rounds, found.history[0]):
                    raise ValueError(f"{rounds.name} does not begin with the lines that it knows")
            except ValueError as reason:
                say(f"{path} is damaged and is not used ({reason})")
                disk.remove(path)
            else:
                self.resumed, self.lineage = sorted({*found.resumed, found.round}), found.lineage
                places = {node: found.elsewhere.get(node, found.round) for node in found.clients}
                self._kept = {node: (kept, _digest(kept), places[node]) for node, kept in found.clients.items()}
                self._uses = {found.round: {found.round, *places.values()}}
                return found
        return None

    def _load(self, path: Path) -> Checkpoint:
        """The checkpoint with the states that are elsewhere. Raises ValueError for a file that is not whole."""
        found = Checkpoint.load(path)
        files = {round: Checkpoint.load(self._path(round)).clients for round in set(found.elsewhere.values())}
        try:
            clients = found.clients | {node: files[round][node] for node, round in found.elsewhere.items()}
        except KeyError as error:
            raise ValueError(f"no earlier one has the state of node {error}") from error
        return replace(found, clients=clients)

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.safetensors"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"))


class Released:
    """Which state each round of a private simulation left, by digest; nothing is ever taken out of it.

    A round that is taken again draws the same noise. That costs nothing as long as it comes out the same; the same noise on
    something else would lay open the difference of the two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests: dict[int, str] = {}

    def recall(self, last: Checkpoint | None, begun: bool, idle: bool) -> str:
        """Read what earlier processes noted; `last` is what the run goes on from.

        `begun` says whether a round was ever begun, `idle` whether none was after `last`. Where the file is lost, what it
        said is known again if no more was released than `last` has; the returned sentence says so. Raises ConfigError for any
        other loss.
        """
        said, anew = "", last is not None and last.round > 0 and idle
        try:
            self.digests = self._read()
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if begun and not anew:
                raise self._lost(reason) from error
            self.digests = {last.round: last.digest} if last and anew else {}
            said = f"{self.path} is made again from the checkpoint ({reason})" if anew else ""
        if last and last.round and self.digests.get(last.round) != last.digest:
            raise self._lost(f"it does not have the state of round {last.round}, which the checkpoint has")
        return said

    def note(self, round: int, state: ServerState) -> None:
        """To be called before anybody is sent what a round left. Raises RunError if the round came out otherwise before."""
        digest = digest_of(state)
        if round in self.digests and self.digests[round] == digest:
            return
        if round <= max(self.digests, default=0):
            known = "came out otherwise than before" if round in self.digests else "came out nobody knows how before"
            raise RunError(
                f"round {round} {known} the run was broken off (a client that dropped out, another machine?), and to go on "
                "would use its noise twice; begin anew with another seed and overwrite=true"
            )
        self.digests[round] = digest
        self.write()

    def _read(self) -> dict[int, str]:
        return {int(round): str(digest) for round, digest in disk.unsealed(self.path.read_bytes()).items()}

    def write(self) -> None:
        """Put it on disk, also before the first round, so that a missing file is noticed. Raises RunError."""
        try:
            self.path.parent.mkdir(exist_ok=True)
            disk.write(self.path, disk.sealed({str(round): digest for round, digest in self.digests.items()}).encode())
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror}); the run stops here") from error

    def _lost(self, why: str) -> ConfigError:
        return ConfigError(
            f"cannot read {self.path} ({why[:200]}), so what the run's noise was used with is unknown; restore the file, or "
            "begin anew with another seed and overwrite=true"
        )


def digest_of(state: ServerState) -> str:
    """A digest of all that clients are sent of a state."""
    return messages.digest(messages.named(state.adapters, state.dense, "AB", state.base_correction))


def history(rounds: Path, length: int | None = None) -> tuple[int, str]:
    """The first `length` bytes of the file, or all of it: how many there are, and their digest."""
    try:
        content = rounds.read_bytes()[:length]
    except OSError:
        content = b""
    return len(content), hashlib.sha256(content).hexdigest()


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in sorted(arrays.items()) if name.startswith(prefix)}


def _digest(kept: RecordDict) -> bytes:
    return hashlib.sha256(messages.to_bytes(kept)).digest()

"""An experiment as a device meets it: read from a server's text within the owner's limits, and what follows from it.

Whatever changes what leaves the device or what is spent follows from the experiment. A message that says another thing is
refused.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from fedlora import untrusted
from fedlora.app import experiment
from fedlora.app.assembly import make_strategy
from fedlora.arrays import compression, messages
from fedlora.compute.workbench import Workbench
from fedlora.config import GROUPS, Config, from_dict
from fedlora.deploy.holdings import Holdings, identity, localised, work
from fedlora.deploy.limits import Limits, beyond
from fedlora.deploy.reasons import Reason, Refused
from fedlora.groups.running import LARGEST_NOISE
from fedlora.server.participation import draw_cohort, schedule
from fedlora.server.updates import at_rank
from fedlora.validate import checked
from strategies import LoRAStrategy

PART = 4  # of the owner's memory: what a message's arrays may take is this part, since they are copied on their way
LONGEST = 4_000_000  # characters of the JSON of an experiment: a list of sizes for every one of many clients
UNBOUND = (messages.EXPERIMENT, messages.BASE, messages.LINEAGE, messages.ADDS, messages.RANK, messages.NOISE)


class Experiment:
    """What a device makes of an experiment's JSON; nothing is built or read for it.

    Raises Refused where the text is too long or none that can be run, where it goes beyond the owner's limits, and where it
    is not for this device.
    """

    def __init__(self, text: str, own: Holdings, limits: Limits) -> None:
        self.text, self.own = text, own
        self.most_bytes = limits.memory // PART  # of the arrays of one message
        config = read(text)
        limits.allow(config)
        self.strategy = valid(config)
        self.config = localised(own, config)
        try:
            self.rate, self.steps, _ = work(own, config)
        except ArithmeticError as error:  # of a number that no float can hold
            raise Refused(Reason.MALFORMED, f"the experiment cannot be run: {error}") from error
        limits.allow_steps(self.steps)
        self.name = identity(config)
        self._enough = math.inf  # the least σ that was found to keep what the experiment promises

    @cached_property
    def rounds(self) -> int:
        """The rounds in which the seed draws this client."""
        config = self.config
        return schedule(config.seed, config.rounds, config.clients, config.cohort_size)[self.own.client]

    def ensure_said(self, job: ConfigRecord, round: int, evaluating: bool) -> None:
        """Raises Refused where a message says anything else than what follows from the experiment for that round."""
        if not 1 <= round <= self.config.rounds:
            raise _inconsistent(f"round {round} of rounds={self.config.rounds}")
        said = self.strategy.job(round, evaluating)
        if unknown := sorted(job.keys() - said.keys() - set(UNBOUND)):
            raise _inconsistent(f"{unknown[0]}, which no experiment says")
        for name, value in said.items():
            if type(job.get(name)) is not type(value) or job[name] != value:
                raise _inconsistent(f"{name} is {job.get(name)!r} instead of {value!r}")

    def ensure_drawn(self, round: int) -> None:
        """Raises Refused for a private round that the seed does not draw this client in."""
        config = self.config
        if config.privacy.name == "record":
            everyone = list(range(config.clients))
            if self.own.client not in draw_cohort(config.seed, round, everyone, config.cohort_size):
                raise _inconsistent(f"the experiment's seed does not draw client {self.own.client} in round {round}")

    def noise(self, job: ConfigRecord) -> float | None:
        """σ of this client, as the message says it; None without record-level privacy.

        Raises Refused where it is less than what the experiment says, or does not keep the ε that the experiment promises.
        """
        from fedlora.privacy import accounting
        from fedlora.privacy.record_level import rounds_counted

        privacy, stated = self.config.privacy, job.get(messages.NOISE)
        if privacy.name != "record":
            if stated is not None:
                raise _inconsistent("noise multipliers without privacy=record")
            return None
        if not isinstance(stated, list) or len(stated) != self.config.clients:
            raise _inconsistent("no list of a noise multiplier for each client")
        sigma = stated[self.own.client]
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma <= LARGEST_NOISE:
            raise _inconsistent(f"a noise multiplier of {sigma!r}")
        if privacy.noise_multiplier is not None:
            enough = sigma >= privacy.noise_multiplier
        elif not (enough := sigma >= self._enough):
            fraction = self.config.cohort_size / self.config.clients
            steps = self.steps * rounds_counted(privacy.participation, self.rounds, self.config.rounds, fraction)
            spent = accounting.epsilon({(sigma, self.rate): steps}, privacy.delta, privacy.accountant, privacy.adjacency)
            if enough := spent <= float(privacy.epsilon or 0):
                self._enough = sigma
        if not enough:
            raise _inconsistent(
                f"σ = {sigma:.4g} does not keep privacy.epsilon={privacy.epsilon}, σ={privacy.noise_multiplier}"
            )
        return sigma

    def begin(self, bench: Workbench, job: ConfigRecord, record: ArrayRecord) -> dict[str, np.ndarray]:
        """The arrays that a round begins with, decoded. Raises Refused for a rank, a name or a shape of another experiment."""
        state = experiment.initial_state(bench, self.strategy)
        ranks = self.strategy.ranks
        rank = self.config.adapter.rank if ranks is None else ranks[self.own.client]
        if job.get(messages.RANK) != rank:
            raise _inconsistent(f"rank {job.get(messages.RANK)!r} instead of {rank}")
        state = at_rank(state, rank)
        shapes: dict[str, tuple[int | None, ...]] = {
            name: array.shape for name, array in messages.named(state.adapters, state.dense).items()
        }
        for layer, pair in state.adapters.items():
            shapes |= {messages.rotation(layer): (rank, rank)} if "R" in self.strategy.downlink else {}
            shapes |= {f"{layer}.base_A.weight": (None, pair.A.shape[1]), f"{layer}.base_B.weight": (len(pair.B), None)}
        arrays = read_arrays(record, self.most_bytes, shapes, self.config.compression.down)
        try:
            _, _, correction = messages.sort(arrays)
        except ValueError as error:
            raise _inconsistent(str(error)) from error
        for name, array in arrays.items():
            if not _fits(array, shapes[name]):
                raise _inconsistent(f"{name} is {array.dtype} of shape {array.shape}")
        if any(len(pair.A) != pair.B.shape[1] for pair in correction.values()):
            raise _inconsistent("a correction whose factors are of two ranks")
        return arrays

    def ask(self, bench: Workbench, action: str, record: ArrayRecord) -> dict[str, np.ndarray]:
        """The arrays of a further message. Raises Refused where they are not those that the strategy asks with."""
        if self.strategy.silent:  # the secure sum checks what it is given by its own protocol
            return read_arrays(record, self.most_bytes)
        _, down = self.strategy.sent_further(experiment.initial_state(bench, self.strategy))
        arrays = read_arrays(record, self.most_bytes, {name: array.shape for name, array in down.items()})
        for name, array in arrays.items():
            counts = down[name].dtype.kind == "i"
            if not (np.array_equal(array, down[name]) if counts else _fits(array, down[name].shape)):
                raise _inconsistent(f"{name} of {action} is not what the strategy asks with")
        return arrays


def read(text: str) -> Config:
    """The configuration in a server's text, every value of its setting's type; its ranges are not checked yet."""
    if len(text) > LONGEST:
        raise beyond(f"the experiment is a text of {len(text)} characters, and at most {LONGEST} are read")
    try:
        config = from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(Reason.MALFORMED, f"the experiment is none ({error})") from error
    for group, kind in (("", Config), *GROUPS.items()):
        part = getattr(config, group) if group else config
        for name, hint in get_type_hints(kind).items():
            if not _is(getattr(part, name), hint):
                raise Refused(Reason.MALFORMED, f"the experiment's {group}.{name} is of another type")
    return config


def valid(config: Config) -> LoRAStrategy:
    """The strategy of a configuration that can be run. Raises Refused for any other."""
    try:
        return make_strategy(checked(config))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise Refused(Reason.MALFORMED, f"the experiment cannot be run: {error}") from error


def read_arrays(
    record: ArrayRecord, most_bytes: int, shapes: compression.Shapes | None = None, encoding: str = "none"
) -> dict[str, np.ndarray]:
    """The arrays of a record by name, decoded; `shapes` are those that it may have, of which encoded ones must be.

    Raises Refused for more than `most_bytes` bytes, for bytes that hold no array, for another name and another encoding.
    """
    for sent in record:
        name, _, method = sent.partition(compression.MARK)
        if (shapes is not None and name not in shapes) or method not in ("", encoding):
            raise _inconsistent(f"an array {sent[:80]!r}, which the experiment does not have")
    try:
        return compression.decode(untrusted.arrays(record, most_bytes), shapes)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, f"arrays that cannot be read ({error})") from error


def _fits(array: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    """Whether these are finite numbers of that shape; an axis None is a correction's rank, at most the other axis' length."""
    if array.dtype.kind != "f" or array.ndim != len(shape):
        return False
    most = [own if own is not None else max(n for n in shape if n is not None) for own in shape]
    exact = all(own in (None, length) for own, length in zip(shape, array.shape, strict=True))
    return exact and all(n <= m for n, m in zip(array.shape, most, strict=True)) and bool(np.isfinite(array).all())


def _is(value: Any, hint: Any) -> bool:
    """Whether JSON's value is of the type that a setting is declared with."""
    if hint is Any:
        return True
    if isinstance(hint, UnionType):
        return any(_is(value, kind) for kind in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, bool) == (hint is bool) and isinstance(value, hint)


def _inconsistent(details: str) -> Refused:
    return Refused(Reason.INCONSISTENT, f"the message asks for what its experiment does not say: {details}")

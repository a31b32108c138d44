"""What every federated LoRA strategy shares: a real Flower strategy around one pure `merge`.

A subclass is the paper's server step and nothing else. This file draws the cohort, averages what is not an adapter (the
head), measures the round, and speaks Flower; `fedlora.server.wire` is what travels.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedlora import check
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Adapters
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError, RunError
from fedlora.server import foreign
from fedlora.server.evaluation import Evaluation, share_of
from fedlora.server.metrics import client_metrics, geometry, signal_to_noise
from fedlora.server.participation import draw_cohort
from fedlora.server.report import RoundReport
from fedlora.server.rollcall import RollCall
from fedlora.server.secure import SecureMean
from fedlora.server.updates import average_dense, capped
from fedlora.server.wire import Ask, Unequal, whole

__all__ = ["FlowerFedAvg", "LoRAStrategy", "RoundReport"]


class LoRAStrategy(Evaluation):
    """Base of all strategies; usable in anybody's ServerApp, whose clients answer with PEFT's array names.

    Clients are taken for anybody's: they know PEFT's arrays and no more. A strategy that needs more of them refuses to start.
    Keywords besides Flower's own (`fraction_train`, `min_available_nodes`, …):
    `init` names how the runtime draws A (kaiming, orthonormal or pissa; B starts at zero), `scale` is alpha / rank,
    `seed` draws the cohorts, out of so many `clients` whether they are online or not (none: out of those online),
    `min_success` is the share of a cohort that must return a usable update (a round below it raises RunError), `patience`
    the seconds to wait for `min_available_nodes` to come online, `evaluate_every` the rounds from one evaluation on the
    clients to the next, and `rounds` the last round, after which there is one too. With `poisson` every node is drawn by
    itself, with the probability `fraction_train` gives it, so that cohorts vary in size. `ranks` are those of clients 0, 1,
    …, none above the state's.
    `round_timeout` is how many seconds further messages of a round are waited for (the first ones: Flower's `timeout`).
    With `derive` the clients are fedlora's own, which know how everything began: only what they cannot derive is sent down,
    `encodes` says how it is encoded, what they send, and for top_k the share of it. With `beyond_peft` they are others that do
    what the strategy needs (docs/extending.md): they tell their number when asked, and are sent everything.
    `max_weight` is the share of a cohort's weight that one client may have at most, since examples are a client's own word. An
    update longer than `max_update` times the median of its cohort's is left out and named.
    """

    def __init__(
        self,
        *,
        init: Annotated[str, "how A begins: kaiming, orthonormal or pissa"] = "kaiming",
        scale: float = 1.0,
        seed: int = 0,
        clients: int | None = None,
        min_success: float = 0.5,
        patience: float = 600.0,
        evaluate_every: int = 1,
        rounds: int | None = None,
        poisson: bool = False,
        ranks: Sequence[int] | None = None,
        derive: bool = False,
        beyond_peft: bool = False,
        encodes: tuple[str, str, float] = ("none", "none", 0.1),
        round_timeout: float = 3600.0,
        max_weight: float = 1.0,
        max_update: float = 100.0,
        **flower: Any,
    ) -> None:
        evaluated = flower.pop("fraction_evaluate", 0.0)
        super().__init__(**flower)
        self.fraction_evaluate = evaluated  # set here, since Flower logs a warning for 0, our default
        aggregate = foreign.no_metrics if derive else foreign.mean_metrics
        self.train_metrics_aggr_fn = flower.get("train_metrics_aggr_fn") or aggregate
        self.evaluate_metrics_aggr_fn = flower.get("evaluate_metrics_aggr_fn") or aggregate
        self.init = check.one_of(("kaiming", "orthonormal", "pissa"), **{"strategy.init": init})
        self.scale, self.seed, self.poisson = scale, seed, poisson
        self.evaluate_every, self.rounds = evaluate_every, rounds
        self.clients = clients
        self.min_success = check.fraction(min_success=min_success)
        self.ranks, self.derive, self.beyond_peft = ranks, derive, beyond_peft
        self.encodes, self.round_timeout = encodes, round_timeout
        self.max_weight, self.max_update = check.fraction(max_weight=max_weight), check.positive(max_update=max_update)
        if ranks is not None and self.unequal is Unequal.NO:
            raise ConfigError(
                f"adapter.ranks does not go with strategy={self.name}: {self.one_rank}; give all clients one rank"
            )
        self.state = None
        self.initial, self.report = {}, None
        # Draws a round's cohort out of these clients, so many of them.
        self.draw: Callable[[int, list[int], int], list[int]] = lambda round, clients, size: draw_cohort(
            self.seed, round, clients, size, self.poisson
        )
        # Called with each round's cohort before anything is sent; returns who takes part (a budget may be spent).
        self.admit: Callable[[int, list[int]], list[int]] = lambda round, cohort: cohort
        # Where set, turns what clients sent into what may be merged, an empty list too (user-level privacy).
        self.release: Callable[[ServerState, list[Update], int, str], list[Update]] | None = None
        # Where set, the same for a mean that bears with outliers, of the factors that clients send.
        self.robust: Callable[[ServerState, list[Update], str], list[Update]] | None = None
        # Where set, moves from the state before to what a merge made of these factors its own way (momentum, Adam).
        self.optimizer: Callable[[ServerState, ServerState, str], ServerState] | None = None
        # Where set, asks for sums of what clients keep, so that nobody's own is ever sent (secure aggregation).
        self.sum_of: SecureMean | None = None
        # Called with the state that a round leaves, before anybody is sent it.
        self.settled: Callable[[int, ServerState], None] = lambda round, state: None
        self.roll = RollCall(patience, clients, asks=derive or beyond_peft)
        self._sent, self._tested, self._job, self._order = [], [], ConfigRecord(), ()
        self._grid = None
        self._done = 0  # rounds before the first of `start`
        self._left_off: tuple[int, ServerState, Adapters] | None = None  # what `go_on` was given

    def go_on(self, done: int, state: ServerState, initial: Adapters) -> None:
        """Make the next `start`, which is to be given the arrays of `state`, the rest of a run after `done` of its rounds.

        `state` is what round `done` left, `initial` the factors that the run began with. Flower counts the rounds from 1 again,
        for `evaluate_fn` too; whatever depends on the round is told round `done` + 1, `done` + 2, …
        """
        self._left_off = done, state, initial

    def gather(self, state: ServerState, updates: list[Update], round: int, ask: Ask) -> list[Update]:
        """What is merged, from what clients sent; a strategy with `two_phase` asks for more of it here."""
        return updates

    @abstractmethod
    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """The paper's server step, pure: the state after `round` from the state before it and the clients' updates.

        `updates` come sorted by client, complete and in the state's scale: a factor that a client did not send is the one
        it was given. The state's dense arrays are averaged already.
        """

    # ---- Flower's hooks

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages for this round's cohort, drawn from (seed, round) alone and the same on every grid."""
        if self.state is None or server_round == 1:  # Flower's start() counts from 1: a new run begins with a new memory
            self._begin(arrays)
        server_round += self._done
        self.state, self._grid = self._adopt(arrays), grid
        if self.fraction_train == 0.0:  # Flower's way to say that nobody trains
            self._sent, self.report = [], RoundReport(server_round, [])
            return []
        nodes = self.roll.nodes(grid, max(self.min_available_nodes, self.min_train_nodes))
        everyone = sorted(nodes) if self.clients is None else list(range(self.clients))
        drawn = self.draw(server_round, everyone, share_of(len(everyone), self.fraction_train, self.min_train_nodes))
        cohort = self.admit(server_round, [client for client in drawn if client in nodes])
        away = {client: "not online" for client in drawn if client not in nodes}
        if not cohort and self.release is None:
            raise RunError(f"round {server_round}: no client that was drawn is online and may take part")
        self._sent = self._messages(arrays, config, server_round, [nodes[c] for c in cohort], MessageType.TRAIN)
        down = sum(messages.array_bytes(message.content) for message in self._sent)
        self.report = RoundReport(server_round, sorted([*cohort, *away]), away, dict(self.roll.refused), bytes_down=down)
        self.report.sent_at = time.perf_counter()
        return self._sent

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, average the dense arrays, merge, and measure. Raises RunError if too few are usable."""
        assert self.state is not None and self.report is not None, "configure_train comes first"
        if self.fraction_train == 0.0:
            return None, None
        server_round += self._done
        report, before, sends = self.report, self.state, self.sends(server_round)
        updates, merged = self._receive(replies, server_round)
        updates, merged = capped(updates, self.max_weight), capped(merged, self.max_weight)
        if updates:
            ask = self._ask
            if self.sum_of:
                merged = self.sum_of(before, merged, server_round, sends, ask, report.drops.setdefault)
            else:
                merged = self.gather(before, merged, server_round, ask)
        updates = [update for update in updates if update.client not in report.drops]
        taken, self._taken = [self._taken[update.client] for update in updates if update.client in self._taken], {}
        if not self.derive:
            self._say_drops(report)
        received_at = time.perf_counter()
        report.seconds_train = received_at - report.sent_at
        needed = int(np.ceil(round(self.min_success * len(report.cohort), 9)))  # .55 of 20 is 11
        needed = max(needed, 1 if self.release is None else 0)  # without a release there is nothing to merge in nothing
        if len(updates) < needed:
            reasons = "; ".join(f"client {c}: {why}" for c, why in list(report.drops.items())[:3])
            raise RunError(
                f"round {server_round}: {len(updates)} of {len(report.cohort)} clients returned a usable update, "
                f"min_success={self.min_success} asks for {needed} ({reasons})"
            )
        if self.robust:
            merged = self._robust_mean(before, merged, sends)
        if self.release:
            merged = self.release(before, merged, server_round, sends)
        merged = capped(merged, self.max_weight)  # once more, of those that are left
        self.state = self._merged(before, merged, server_round)
        self.settled(server_round, self.state)
        report.seconds_merge = time.perf_counter() - received_at
        report.metrics |= (
            geometry(before, self.state, merged, self.initial)
            | client_metrics(updates)
            | signal_to_noise(before, merged, updates)
        )
        measured = self.train_metrics_aggr_fn(taken, self.weighted_by_key)
        return self._record(messages.named(*whole(self.state))), MetricRecord({**report.metrics, **measured})

    def _begin(self, arrays: ArrayRecord) -> None:
        """The memory of a new run. Raises ConfigError where these arrays or the clients do not suit the strategy."""
        sent = messages.state_of(arrays, self.scale)
        foreign.ensure_suits(self, sent)
        if self.state is not None:
            self.roll = replace(self.roll, client={}, examples={}, refused={}, named=False)
        self._order = tuple(arrays)
        self._done, self.state, self.initial = self._left_off or (0, sent, sent.adapters)
        self._left_off = None

    def _say_drops(self, report: RoundReport) -> None:
        """Log whom a round left out: in somebody's ServerApp nobody else reads the report."""
        nodes = {client: node for node, client in self.roll.client.items()}
        for client, why in list(report.drops.items())[:3]:
            self.roll.say(f"round {report.round}: client {client} (node {nodes.get(client)}) is left out: {why}")
        if len(report.drops) > 3:
            self.roll.say(f"round {report.round}: {len(report.drops) - 3} more clients are left out")

    def _merged(self, before: ServerState, updates: list[Update], round: int) -> ServerState:
        """The state after a round. Raises RunError where it holds a number that is not finite: no checkpoint is to have one."""
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                state = self.merge(replace(before, dense=average_dense(updates)), updates, round)
                if self.optimizer:
                    state = self.optimizer(before, state, self.sends(round))
                state = self._derivable(before, state)
        except np.linalg.LinAlgError as error:
            raise RunError(f"round {round}: the updates cannot be merged ({error}); the state before it stays") from error
        arrays = messages.named(*whole(state)) | state.extra
        if wrong := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise RunError(
                f"round {round}: the merged {wrong[0]} has numbers that are not finite; the state before it stays. "
                "Lower train.lr or server.max_update, or set server.mean=median"
            )
        return state

    def summary(self) -> None:
        """Nothing: the runtime prints what differs from the defaults, and Flower's table would say it again."""

    def _robust_mean(self, before: ServerState, updates: list[Update], sends: str) -> list[Update]:
        """What the robust mean leaves to merge; whom it leaves out is named."""
        assert self.robust is not None and self.report is not None
        merged = self.robust(before, updates, sends)
        if len(merged) != 1 or merged[0].client >= 0:
            for client in {update.client for update in updates} - {update.client for update in merged}:
                self.report.drops[client] = "left out by server.mean: its update is much longer than the others'"
        return merged

    @property
    def remembered(self) -> bool:
        """Whether clients keep something from one round to the next."""
        return bool(self.personal) or self.encodes[1] != "none"

    @property
    def silent(self) -> bool:  # type: ignore[override]
        """Whether clients keep all that they trained until they are asked for sums of it."""
        return self.sum_of is not None

    @property
    def streams(self) -> bool:  # type: ignore[override]
        """Whether no more than the sum of the updates is needed."""
        return self.linear and not (self.silent or self.release or self.robust)

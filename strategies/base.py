"""What every federated LoRA strategy shares: a real Flower strategy around one pure `merge`.

A subclass is the paper's server step and nothing else. This file draws the cohort, checks what clients send, averages
what is not an adapter (the head), counts bytes, measures the round, and speaks Flower.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedlora import check, messages
from fedlora.check import RunError
from fedlora.messages import ServerState, Update
from fedlora.participation import draw_cohort
from strategies.metrics import client_metrics, geometry, signal_to_noise
from strategies.updates import MANY, Sum, average_dense, read_update


@dataclass
class RoundReport:
    """What happened in one round, as the server saw it."""

    round: int
    cohort: list[int]  # clients drawn
    drops: dict[int, str] = field(default_factory=dict)  # client → why its update was not used
    bytes_up: int = 0
    bytes_down: int = 0
    seconds_train: float = 0.0  # from handing the messages to the grid to having the replies
    seconds_merge: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    sent_at: float = 0.0  # time.perf_counter() when the messages were handed to the grid

    def as_row(self, started: float) -> dict[str, Any]:
        """The round as a line of rounds.jsonl; `started` is the run's own time.perf_counter()."""
        row = asdict(self)
        metrics, sent_at = row.pop("metrics"), row.pop("sent_at")
        return row | metrics | {"started": sent_at - started}


class LoRAStrategy(FlowerFedAvg):
    """Base of all strategies; usable in anybody's ServerApp, whose clients answer with PEFT's array names.

    Keywords besides Flower's own (`fraction_train`, `min_available_nodes`, …):
    `init` names how the runtime draws A (kaiming, orthonormal or pissa; B starts at zero), `scale` is alpha / rank,
    `seed` draws the cohorts, `min_success` is the share of a cohort that must return a usable update (a round below it
    raises RunError), `patience` the seconds to wait for `min_available_nodes` to come online, `evaluate_every` the rounds
    from one evaluation on the clients to the next. With `poisson` every node is drawn by itself, with the probability
    `fraction_train` gives it, so that cohorts vary in size.
    """

    trains: ClassVar[str] = "AB"  # what a client updates and sends: "AB", "B", "A" or "R"
    paper: ClassVar[str]  # name and arXiv number
    exact: ClassVar[bool]  # whether the merged product is Σ p_k B_k A_k
    linear: ClassVar[bool] = False  # whether merge needs no more of the updates than their weighted mean

    def __init__(
        self,
        *,
        init: Annotated[str, "how A begins: kaiming, orthonormal or pissa"] = "kaiming",
        scale: float = 1.0,
        seed: int = 0,
        min_success: float = 0.5,
        patience: float = 600.0,
        evaluate_every: int = 1,
        poisson: bool = False,
        **flower: Any,
    ) -> None:
        evaluated = flower.pop("fraction_evaluate", 0.0)
        super().__init__(**flower)
        self.fraction_evaluate = evaluated  # set here, since Flower logs a warning for 0, our default
        self.init = check.one_of(("kaiming", "orthonormal", "pissa"), **{"strategy.init": init})
        self.scale, self.seed, self.patience, self.evaluate_every = scale, seed, patience, evaluate_every
        self.min_success = check.fraction(min_success=min_success)
        self.state: ServerState | None = None
        self.report: RoundReport | None = None  # of the newest round
        # Called with each round's cohort before anything is sent; returns who takes part (a budget may be spent).
        self.admit: Callable[[int, list[int]], list[int]] = lambda round, cohort: cohort
        # Where set, turns what clients sent into what may be merged, an empty list too (user-level privacy).
        self.release: Callable[[ServerState, list[Update], int, str], list[Update]] | None = None
        self.poisson = poisson
        self._clients: dict[int, int] = {}  # node id → client
        self._named = False  # whether any node has said which client it is
        self._sent: list[Message] = []

    @abstractmethod
    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """The paper's server step, pure: the state after `round` from the state before it and the clients' updates.

        `updates` come sorted by client and complete: a factor that a client does not train is the one broadcast. The
        state's dense arrays are averaged already.
        """

    # ---- Flower's hooks

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages for this round's cohort, drawn from (seed, round) alone and the same on every grid."""
        sent = messages.state_of(arrays, self.scale)
        if self.state is None or server_round == 1:  # Flower's start() counts from 1: a new run begins with a new memory
            self.state = sent
        self.state = replace(self.state, adapters=sent.adapters, dense=sent.dense)
        nodes = self._roll_call(grid)
        drawn = draw_cohort(self.seed, server_round, sorted(nodes), self._size(len(nodes)), self.poisson)
        cohort = self.admit(server_round, drawn)
        if not cohort and self.release is None:
            raise RunError(f"round {server_round}: no client that was drawn may take part any more")
        self._sent = self._messages(arrays, config, server_round, [nodes[c] for c in cohort], MessageType.TRAIN)
        down = sum(messages.array_bytes(message.content) for message in self._sent)
        self.report = RoundReport(server_round, cohort, bytes_down=down)
        self.report.sent_at = time.perf_counter()
        return self._sent

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, average the dense arrays, merge, and measure. Raises RunError if too few are usable."""
        assert self.state is not None and self.report is not None, "configure_train comes first"
        report, before = self.report, self.state
        updates, merged = self._receive(replies)
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
        if self.release:
            merged = self.release(before, updates, server_round, self.trains)
        self.state = self.merge(replace(before, dense=average_dense(merged)), merged, server_round)
        report.seconds_merge = time.perf_counter() - received_at
        report.metrics |= (
            geometry(before, self.state, merged) | client_metrics(updates) | signal_to_noise(before, merged, updates)
        )
        return messages.pack(self.state.adapters, self.state.dense), MetricRecord(dict(report.metrics))

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages that ask every client to test the merged model on what it holds back, if fraction_evaluate is set."""
        if self.fraction_evaluate == 0.0 or server_round % self.evaluate_every:
            return []
        nodes = self._roll_call(grid)
        sent = self._messages(arrays, config, server_round, [nodes[c] for c in sorted(nodes)], MessageType.EVALUATE)
        if self.report is not None:
            self.report.bytes_down += sum(messages.array_bytes(message.content) for message in sent)
        return sent

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean and spread over clients of their own accuracy: each client that tested counts once, whatever its size."""
        results = [metrics for r in replies if r.has_content() for metrics in r.content.metric_records.values()]
        tested = [m for m in results if "accuracy" in m and m.get(self.weighted_by_key)]
        accuracies = np.array([m["accuracy"] for m in tested], dtype=float)
        if accuracies.size == 0:
            return None
        spread = {
            "client_accuracy_mean": float(accuracies.mean()),
            "client_accuracy_std": float(accuracies.std()),
            "client_accuracy_worst_decile": float(np.quantile(accuracies, 0.1)),
            "clients_evaluated": int(accuracies.size),
        }
        if self.report is not None:
            self.report.metrics |= spread
        return MetricRecord(dict(spread))

    def summary(self) -> None:
        """Nothing: the runtime prints what differs from the defaults, and Flower's table would say it again."""

    # ---- the parts

    def _size(self, available: int) -> int:
        return min(available, max(round(available * self.fraction_train), self.min_train_nodes, 1))

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, server_round: int, nodes: list[int], kind: str
    ) -> list[Message]:
        config[messages.ROUND], config[messages.TRAINS] = server_round, self.trains
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return list(self._construct_messages(content, nodes, kind))

    def _roll_call(self, grid: Grid) -> dict[int, int]:
        """Client → node id. Node ids are random on some grids, so each new node is asked once which client it is.

        As long as no node answers (a ClientApp without a query function) new ones are numbered in the order of their
        ids; where only some do, the silent ones stay out and are asked again in the next round.
        """
        deadline = time.monotonic() + self.patience
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            if time.monotonic() > deadline:
                raise RunError(f"{len(nodes)} of {self.min_available_nodes} nodes came online in {self.patience:g} s")
            time.sleep(0.1)
        if new := [node for node in nodes if node not in self._clients]:
            queries = self._construct_messages(RecordDict(), new, MessageType.QUERY)
            replies = list(grid.send_and_receive(queries, timeout=self.patience))
            named = {r.metadata.src_node_id: client for r in replies if (client := answered(r)) is not None}
            self._named |= bool(named)
            self._clients |= named if self._named else {node: i for i, node in enumerate(new, len(self._clients))}
        return {self._clients[node]: node for node in nodes if node in self._clients}

    def _receive(self, replies: Iterable[Message]) -> tuple[list[Update], list[Update]]:
        """The usable updates in order of client, and what there is to merge; other replies are named in the report.

        What there is to merge are the same updates; or, of a large cohort where nothing but the mean is needed, that mean
        as one update, and of each client only what it measured.
        """
        assert self.state is not None and self.report is not None
        sent = [m.metadata for m in self._sent]
        by_message = {m.message_id: self._clients[m.dst_node_id] for m in sent if m.message_id}  # some grids set no ids
        total = Sum(self.trains) if self.linear and self.release is None and len(self.report.cohort) >= MANY else None
        updates: dict[int, Update] = {}
        for reply in replies:
            about = reply.metadata  # where a node was killed the SuperLink answers for it, so the source is the last resort
            client = by_message.get(about.reply_to_message_id) if by_message else self._clients.get(about.src_node_id)
            if client is None or client not in self.report.cohort or client in updates:
                continue  # not a reply to this round
            if reply.has_error():
                self.report.drops[client] = ((reply.error.reason or "").strip() or "error").splitlines()[-1]
                continue
            self.report.bytes_up += messages.array_bytes(reply.content)
            try:
                update = read_update(client, reply.content, self.state, self.weighted_by_key, self.trains)
            except ValueError as reason:
                self.report.drops[client] = str(reason)
                continue
            if total is not None:
                total.add(update)
                update = replace(update, adapters={}, dense={})
            updates[client] = update
        for client in self.report.cohort:
            if client not in updates:
                self.report.drops.setdefault(client, "no reply in time")
        self.report.drops = dict(sorted(self.report.drops.items()))  # replies come in any order
        self._sent = []
        in_order = [updates[client] for client in sorted(updates)]
        return in_order, in_order if total is None else [total.mean(self.state)] if in_order else []


def answered(reply: Message) -> int | None:
    """The client that a reply to the roll call names, if it names one."""
    records = reply.content.metric_records.values() if reply.has_content() else ()
    return next((int(m[messages.CLIENT]) for m in records if messages.CLIENT in m), None)  # type: ignore[arg-type]

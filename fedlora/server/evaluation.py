"""The merged model tested by clients on what they hold back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora import seeds, untrusted
from fedlora.arrays import messages
from fedlora.server.inbox import Inbox
from fedlora.server.replies import accuracy_of
from fedlora.untrusted import Malformed


class Evaluation(Inbox):
    """The part of a strategy that asks clients to test, and reads what they say."""

    seed: int
    evaluate_every: int
    rounds: int | None  # the last one
    evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord]
    _done: int  # rounds before the first of `start`
    _tested: list[Message]

    def evaluates(self, round: int) -> bool:
        """Whether clients test the model that this round leaves: every so many rounds, and after the last."""
        return self.fraction_evaluate > 0 and (round % self.evaluate_every == 0 or round == self.rounds)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages that ask `fraction_evaluate` of the clients, or `min_evaluate_nodes`, to test the merged model.

        Which of them, (seed, round) says alone.
        """
        server_round += self._done
        if not self.evaluates(server_round):
            return []
        if not self.derive:
            self.state = self._adopt(arrays)
        nodes = self.roll.nodes(grid, max(self.min_available_nodes, self.min_evaluate_nodes))
        asked, size = sorted(nodes), share_of(len(nodes), self.fraction_evaluate, self.min_evaluate_nodes)
        if size < len(asked):
            rng = seeds.stream(self.seed, "evaluation", round=server_round)
            asked = sorted(asked[place] for place in rng.choice(len(asked), size, replace=False))
        self._tested = self._messages(arrays, config, server_round, [nodes[c] for c in asked], MessageType.EVALUATE)
        if self.report is not None:
            self.report.bytes_down += sum(messages.array_bytes(message.content) for message in self._tested)
        return self._tested

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean and spread over clients of their own accuracy, and whatever else they measured, by its own name.

        In mean and spread each client that tested counts once, whatever its size; what else they measured is a mean weighted
        by `weighted_by_key`, or what `evaluate_metrics_aggr_fn` makes of it. Of a client that was asked and whose reply says
        no accuracy in [0, 1], the report says why.
        """
        if self.report is None:  # nothing was asked
            return None
        report, tested, found, contents = self.report, self._tested, dict[int, float](), dict[int, RecordDict]()
        self._tested = []
        for client, content in self._contents(replies, tested, report.untested):
            contents[client] = content
            try:
                accuracy = accuracy_of(content, self.weighted_by_key)
            except Malformed as reason:
                report.untested[client] = untrusted.text(str(reason))
                continue
            if accuracy is not None:
                found[client] = accuracy
        in_order = [contents[client] for client in sorted(contents)]
        spread: dict[str, float] = {}
        if found:
            report.client_accuracy = dict(sorted(found.items()))
            accuracies = np.array(list(report.client_accuracy.values()))
            spread = {
                "client_accuracy_mean": float(accuracies.mean()),
                "client_accuracy_std": float(accuracies.std()),
                "client_accuracy_worst_decile": float(np.quantile(accuracies, 0.1)),
                "clients_evaluated": int(accuracies.size),
            }
        report.metrics |= spread
        measured = self.evaluate_metrics_aggr_fn(in_order, self.weighted_by_key) if in_order else MetricRecord()
        return MetricRecord({**spread, **measured}) if spread or measured else None


def share_of(available: int, fraction: float, least: int) -> int:
    """How many of the available clients a fraction is: at least `least` and 1, at most all."""
    return min(available, max(round(available * fraction), least, 1))

"""The ClientApp: what a client does with a message, in this process, on a Ray worker and on a device alike.

A client is a function of (broadcast, its data, its random streams). It keeps nothing: the workbench is shared by all the
clients of a process, and every array that a round changes is written before it is read.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora import messages

if TYPE_CHECKING:
    from clients.private import Mechanism
    from fedlora.config import Config
    from fedlora.workbench import Workbench

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The roll call: which client this node is."""
    metrics = MetricRecord({messages.CLIENT: _client(context)})
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Write the broadcast into the resident model, train on this client's examples, send back what was trained."""
    from clients.train import train as train_locally  # torch and transformers load here, not for a roll call

    started = time.perf_counter()
    job, client, bench = _open(message, context)
    round, trains = int(job[messages.ROUND]), str(job[messages.TRAINS])  # type: ignore[arg-type]
    config, (indices, _) = bench.config, bench.examples_of(client)
    metrics = train_locally(
        bench.model,
        bench.train,
        indices,
        config.train,
        trains,
        (round, config.rounds),
        (config.seed, client, round),
        _mechanism(config, job, client),
    )
    measured = MetricRecord({**metrics, "seconds": time.perf_counter() - started})
    measured[messages.CLIENT], measured[messages.EXAMPLES] = client, len(indices)
    arrays = messages.pack(bench.model.adapters(), bench.model.dense(), trains)
    return Message(RecordDict({messages.ARRAYS: arrays, messages.METRICS: measured}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the broadcast model on the examples that this client holds back (none: a count of zero)."""
    from fedlora.evaluate import evaluate as evaluate_locally

    _, client, bench = _open(message, context)
    _, held_out = bench.examples_of(client)
    metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: len(held_out), "accuracy": 0.0, "loss": 0.0})
    if len(held_out):
        measured = evaluate_locally(bench.model, bench.train, held_out, bench.config.evaluate.batch_size)
        metrics["accuracy"], metrics["loss"] = measured["accuracy"], measured["loss"]
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


def _open(message: Message, context: Context) -> tuple[ConfigRecord, int, Workbench]:
    """The message's settings, this client's number, and the workbench with the broadcast written into its model."""
    from fedlora import workbench

    job: ConfigRecord = message.content.config_records[messages.CONFIG]
    bench = workbench.build(workbench.experiment(str(job[messages.EXPERIMENT])))
    bench.model.write(*messages.unpack(message.content.array_records[messages.ARRAYS]))
    return job, _client(context), bench


def _mechanism(config: Config, job: ConfigRecord, client: int) -> Mechanism | None:
    """What makes this client's steps private, if anything does: σ comes with the message, the rest is a setting."""
    if config.privacy.name != "record":
        return None
    from clients.private import Mechanism

    sigmas = job[messages.NOISE]
    return Mechanism(sigmas[client], config.privacy.clip)  # type: ignore[index, arg-type]


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])

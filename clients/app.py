"""The ClientApp: what a client does with a message, in this process, on a Ray worker and on a device alike.

A client is a function of (broadcast, its data, its random streams, its own state). The process keeps nothing of it: the
workbench is shared by all its clients, and every array that a round changes is written before it is read. What must stay
with a client from one message to the next is in Flower's `Context.state`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import asked, start
from clients.start import Start, Trained
from fedlora.arrays import messages, sums
from fedlora.check import RunError

if TYPE_CHECKING:
    from clients.task import Task
    from fedlora.compute.workbench import Workbench


KEY = "key"  # of a device's own node configuration: the key of one private training, 64 hexadecimal digits


class CohortApp(ClientApp):
    """A Flower ClientApp that an engine may also hand the training messages of several clients at once."""

    def cohorts(self, batch: Sequence[tuple[Message, Context]], size: int | Mapping[str, int] | None) -> list[list[int]]:
        """Which of these training messages had best go together, by their places: the most work first.

        `size` is the number of clients in a cohort, or that number by what they train; None: what is quickest on this machine.
        """
        from clients.cost import cohort_size, group

        job, bench = _job(batch[0][0])
        trains = str(job[messages.TRAINS])
        size = cohort_size(bench, trains, len(batch), size.get(trains) if isinstance(size, Mapping) else size)
        return group([_task(message, context) for message, context in batch], size)

    def together(self, batch: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies to the training messages of one experiment, in their order; the clients share their passes."""
        from clients.cohort import Member, train_together

        _ensure(batch[0][0])
        started = time.perf_counter()
        bench = _job(batch[0][0])[1]
        if bench.rows.refusal:
            return [self(message, context) for message, context in batch]
        starts = _starts(batch, bench)
        members = [
            Member(_task(message, context), begun.adapters, begun.dense, begun.scale)
            for (message, context), begun in zip(batch, starts, strict=True)
        ]
        # Cells of a sweep may share a pass, but not where each has moved something of its own into the base, nor with an R.
        alike: dict[tuple[str, ...], list[int]] = {}
        for place, begun in enumerate(starts):
            base = str(_job(batch[place][0])[0][messages.EXPERIMENT]) if begun.correction else ""
            alike.setdefault((base, *begun.dense), []).append(place)
        trained: dict[int, Trained] = {}
        for places in alike.values():
            bench.model.write({}, {}, starts[places[0]].correction)
            own = train_together(bench.rows, bench.train, [members[place] for place in places])
            trained |= dict(zip(places, own, strict=True))
        a_step = (time.perf_counter() - started) / sum(member.task.steps for member in members)
        return [
            _reply(message, context, starts[place], member.task, trained[place], a_step * member.task.steps, len(batch))
            for place, ((message, context), member) in enumerate(zip(batch, members, strict=True))
        ]

    def adds(self, message: Message) -> bool:
        """Whether replies to such messages may be added up before they are sent on."""
        training = message.metadata.message_type == MessageType.TRAIN
        return training and bool(message.content.config_records[messages.CONFIG].get(messages.ADDS))

    def added(self, replies: list[Message]) -> list[Message]:
        """The replies, one sum in the place of what they hold; see `fedlora.arrays.sums`."""
        return sums.added(replies)


app = CohortApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The roll call: which client this node is; a device also says how many examples it has."""
    metrics = MetricRecord({messages.CLIENT: _client(context)})
    if messages.EXAMPLES in context.node_config:
        metrics[messages.EXAMPLES] = int(context.node_config[messages.EXAMPLES])
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Write the broadcast into the resident model, train on this client's examples, send back what was trained."""
    from clients.train import perform  # torch and transformers load here, not for a roll call

    _ensure(message)
    started = time.perf_counter()
    bench, task = _job(message)[1], _task(message, context)
    (begun,) = _starts([(message, context)], bench)
    bench.model.write(begun.adapters, begun.dense, begun.correction)
    metrics = perform(task, bench.model, bench.train)
    seconds = time.perf_counter() - started
    return _reply(message, context, begun, task, Trained(bench.model.adapters(), bench.model.dense(), metrics), seconds, 1)


def answer(action: str, message: Message, context: Context) -> Message:
    """Answer a further message of the round, which asks for something of what this client keeps."""
    job, client = message.content.config_records[messages.CONFIG], _client(context)
    arrays = asked.answer(action, client, context.state, job, messages.arrays_of(_arrays(message)))
    content = RecordDict({messages.ARRAYS: messages.record(arrays), messages.METRICS: MetricRecord({messages.CLIENT: client})})
    return Message(content, reply_to=message)


for _action in asked.ACTIONS_KNOWN:
    app.train(_action)(partial(answer, _action))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the broadcast model, with what is this client's own, on the examples that it holds back (none: a count of zero)."""
    from fedlora.compute.evaluate import evaluate as evaluate_locally

    _, bench = _job(message)
    (begun,) = _starts([(message, context)], bench)
    bench.model.write(begun.adapters, begun.dense, begun.correction)
    client = _client(context)
    _, held_out = bench.examples_of(client)
    metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: len(held_out), "accuracy": 0.0, "loss": 0.0})
    if len(held_out):
        measured = evaluate_locally(bench.model, bench.train, held_out, bench.config.evaluate.batch_size)
        metrics["accuracy"], metrics["loss"] = measured["accuracy"], measured["loss"]
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


def _job(message: Message) -> tuple[ConfigRecord, Workbench]:
    """The message's settings, and the workbench of its experiment."""
    from fedlora.compute import workbench

    job: ConfigRecord = message.content.config_records[messages.CONFIG]
    return job, workbench.build_from(str(job[messages.EXPERIMENT]))


def _ensure(message: Message) -> None:
    """Raises ConfigError where a private step would bound no record; tried once a process."""
    job, bench = _job(message)
    if bench.config.privacy.name == "record":
        from clients.bounded import ensure  # Opacus takes a second to load

        ensure(bench, str(job[messages.TRAINS]))


def _task(message: Message, context: Context) -> Task:
    """What this client has to do: with record-level privacy σ comes with the message, the rest is a setting.

    Raises RunError for a private training on a device without a key of the device's own: its server knows the run's seed.
    """
    from clients.task import Task, simulated_key

    (job, bench), client = _job(message), _client(context)
    config, round = bench.config, int(job[messages.ROUND])  # type: ignore[arg-type]
    progress, streams = (round, config.rounds), (config.seed, client, round)
    mechanism = key = None
    if config.privacy.name == "record":
        from clients.private import Mechanism  # Opacus takes a second to load

        mechanism = Mechanism(job[messages.NOISE][client], config.privacy.clip)  # type: ignore[index, arg-type]
        if KEY in context.node_config:
            key = bytes.fromhex(str(context.node_config[KEY]))
        elif config.deploy:
            raise RunError("a device trains privately with a key of its own ledger, and was given none")
        else:
            key = simulated_key(streams, bench.identity, mechanism)
    indices, _ = bench.examples_of(client)
    return Task(indices, config.train, str(job[messages.TRAINS]), progress, streams, mechanism, key)


def _starts(batch: Sequence[tuple[Message, Context]], bench: Workbench) -> list[Start]:
    """What each client starts from; read once where several were sent the very same record."""
    sent = {id(record): start.read(record) for message, _ in batch for record in (_arrays(message),)}
    common: dict[int, Start] = {}
    starts = []
    for message, context in batch:
        record = _arrays(message)
        key = id(context if start.PERSONAL in context.state.array_records else record)
        if key not in common:
            common[key] = start.begin(bench, _job(message)[0], sent[id(record)], context.state)
        starts.append(common[key])
    return starts


def _reply(message: Message, context: Context, begun: Start, task: Task, own: Trained, seconds: float, cohort: int) -> Message:
    measured = MetricRecord({**own.metrics, "seconds": seconds, "cohort": float(cohort)})
    measured[messages.CLIENT], measured[messages.EXAMPLES] = task.streams[1], len(task.indices)
    job: ConfigRecord = message.content.config_records[messages.CONFIG]
    start.keep(context.state, job, begun, own, len(task.indices))
    arrays = messages.record(start.sends(context.state, job, begun, own))
    return Message(RecordDict({messages.ARRAYS: arrays, messages.METRICS: measured}), reply_to=message)


def _arrays(message: Message) -> ArrayRecord:
    return message.content.array_records[messages.ARRAYS]


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])

"""A device: which messages it answers, in which order they are checked, and the one way to the work itself.

The server says how to train (strategy, adapters, learning rate, privacy). The device's owner says on what, where, and how
much at most. Until a piece of work is in the device's ledger, nothing of its examples is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict, UserConfig

from clients import app, asked
from clients.start import LASTING
from fedlora.arrays import messages
from fedlora.check import sentence
from fedlora.compute import workbench
from fedlora.compute.workbench import Workbench
from fedlora.config import CheckpointConfig
from fedlora.deploy.account import EVALUATE, TRAIN, Account, Permit, Work
from fedlora.deploy.experiment import Experiment
from fedlora.deploy.holdings import Holdings, identity
from fedlora.deploy.limits import beyond
from fedlora.deploy.memory import Memory
from fedlora.deploy.reasons import Reason, Refused, printable
from fedlora.deploy.sums import SecureSums, needed
from fedlora.engines.local import CLIENT_RAISED
from fedlora.secure import ACTIONS

PUBLIC = (messages.CLIENT, messages.EXAMPLES, "seconds", "steps")  # what a private round tells besides its update
WORDS = 200  # characters of a digest or a lineage, at most

Does = Callable[[Message, Context], Message]


class Device:
    """Answers messages as the simulator's client does, or refuses them with one of the fixed sentences of `Reason`.

    What a later round begins with is on disk before the reply leaves. What serves within a round only is never written.
    """

    def __init__(
        self, own: Holdings, account: Account, say: Callable[[str], object] = print, sums: SecureSums | None = None
    ) -> None:
        self.own, self.account, self.say, self.sums = own, account, say, sums
        self.memory = Memory(account.folder, say)
        self._experiment: Experiment | None = None  # the one that is kept
        self._state = RecordDict()  # of the training in force
        self._answered: set[str] = set()  # the further messages of it that had their answer

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply, an error where the message is refused or fails. Why, in detail, goes to the device's own log."""
        try:
            with self.account.limits.in_time():
                return self._answer(message, context)
        except Refused as refused:
            reason, details = refused.reason, str(refused)
        except Exception as error:
            reason, details = Reason.FAILED, sentence(error)
        self.say(printable(f"not done ({reason.name.lower()}): {details}"))
        return Message(Error(CLIENT_RAISED, reason.value), reply_to=message)

    def _answer(self, message: Message, context: Context) -> Message:
        """By the message's exact type. Flower's own routes, which know other spellings of a type, are not taken."""
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return app.query(message, self._context(context))
        if kind == MessageType.TRAIN:
            return self._train(message, context)
        if kind == MessageType.EVALUATE:
            return self._evaluate(message, context)
        for action in asked.ACTIONS_KNOWN:
            if kind == f"{MessageType.TRAIN}.{action}":
                return self._further(action, message, context)
        raise Refused(Reason.NOT_ANSWERED, f"a message of type {kind}")

    def _train(self, message: Message, context: Context) -> Message:
        experiment, job, arrays = self._read(message)
        round = _round(job)
        experiment.ensure_said(job, round, evaluating=False)
        experiment.ensure_drawn(round)
        sigma = experiment.noise(job)
        bench = self._bench(experiment, job)
        begun = experiment.begin(bench, job, arrays)
        sums = needed(self.sums) if experiment.config.aggregation == "secure" else None
        about = {"run": message.metadata.run_id, "clip": experiment.config.privacy.clip, "asked": experiment.name}
        name = identity_of(experiment, job)
        most = experiment.rounds if self.own.agreed is not None and sigma is not None else None
        permit = self.account.admit(Work(TRAIN, name, round, about, most), sigma, experiment.rate, experiment.steps)
        self._say_spent(round, experiment.steps, sigma)
        self._answered.clear()
        self._state = self.memory.newest(name, round - 1)
        reply = self._work(permit, app.train, _sent(message, experiment, job, begun), context)
        if sums:
            sums.began(self._state, name, round)
        lasting = RecordDict({name: self._state[name] for name in LASTING if name in self._state})
        self.memory.keep(name, round, lasting, goes_back(experiment.config.checkpoint, round))
        if sigma is not None:
            told = reply.content.metric_records[messages.METRICS]
            reply.content[messages.METRICS] = MetricRecord({name: told[name] for name in PUBLIC if name in told})
        return reply

    def _evaluate(self, message: Message, context: Context) -> Message:
        if math.isfinite(self.account.limits.epsilon):
            raise beyond("this device keeps the accuracy on its own examples to itself, since no ε covers it (--epsilon)")
        experiment, job, arrays = self._read(message)
        round, strategy = _round(job), experiment.strategy
        experiment.ensure_said(job, round, evaluating=True)
        if not strategy.evaluates(round):
            raise Refused(Reason.INCONSISTENT, f"an evaluation after round {round}, where the experiment has none")
        bench = self._bench(experiment, job)
        begun, name = experiment.begin(bench, job, arrays), identity_of(experiment, job)
        about = {"run": message.metadata.run_id, "asked": experiment.name}
        permit = self.account.admit(Work(EVALUATE, name, round, about), None, 1.0, 1)
        self._state = self.memory.newest(name, round)
        return self._work(permit, app.evaluate, _sent(message, experiment, job, begun), context)

    def _further(self, action: str, message: Message, context: Context) -> Message:
        """Of the training in force, once each, where the experiment's strategy asks for it."""
        experiment, job, arrays = self._read(message)
        round, permit = _round(job), self.account.in_force
        experiment.ensure_said(job, round, evaluating=False)
        name = identity_of(experiment, job)
        if permit is None or (permit.work.kind, permit.work.experiment, permit.work.round) != (TRAIN, name, round):
            raise Refused(Reason.OUT_OF_TURN, f"{action} of a training that is not the newest")
        said = experiment.strategy.job(round)
        of_a_sum = action in ACTIONS  # which has an order of its own, and may begin again without a client
        if not said[messages.KEEPS] or said[messages.SILENT] != of_a_sum or (action in self._answered and not of_a_sum):
            raise Refused(Reason.OUT_OF_TURN, f"{action}, which this training is not asked for, or not again")
        content = experiment.ask(self._bench(experiment, job), action, arrays)
        self._answered.add(action)
        does: Does = partial(app.answer, action)
        if of_a_sum:
            does = partial(needed(self.sums), does, experiment=name, round=round, settings=experiment.name)
        return self._work(permit, does, _sent(message, experiment, job, content), context)

    def _work(self, permit: Permit, does: Does, message: Message, context: Context) -> Message:
        """The one way to what a ClientApp does with examples, which takes the permit that the ledger has for it."""
        self.account.ensure(permit)
        own = self._context(context, {} if permit.key is None else {app.KEY: permit.key.hex()})
        own.state = self._state
        reply = does(message, own)
        self._state = own.state
        return reply

    def _read(self, message: Message) -> tuple[Experiment, ConfigRecord, ArrayRecord]:
        """What a message must consist of, and nothing else."""
        if not message.has_content() or set(message.content) != {messages.CONFIG, messages.ARRAYS}:
            raise Refused(Reason.MALFORMED, "it does not consist of a job and arrays")
        job, arrays = message.content[messages.CONFIG], message.content[messages.ARRAYS]
        if not isinstance(job, ConfigRecord) or not isinstance(arrays, ArrayRecord):
            raise Refused(Reason.MALFORMED, "its records are of other kinds")
        text = job.get(messages.EXPERIMENT)
        if not isinstance(text, str):
            raise Refused(Reason.MALFORMED, "it has no experiment")
        if self._experiment is None or self._experiment.text != text:
            self._experiment = Experiment(text, self.own, self.account.limits)
            workbench.build_from.cache_clear()  # one experiment is kept, however many are sent
        return self._experiment, job, arrays

    def _bench(self, experiment: Experiment, job: ConfigRecord) -> Workbench:
        """The workbench. Raises Refused where this device's base model has other frozen weights than the server's."""
        bench = workbench.build(experiment.config)
        own, theirs = bench.model.digest, _words(job, messages.BASE)
        if theirs != own:
            raise Refused(
                Reason.OTHER_BASE,
                f"this device's weights of {experiment.config.model.path or experiment.config.model.name} are others than the "
                f"server's (SHA-256 {own[:12]}… and {theirs[:12]}…); give the device a copy of the server's model, by --model",
            )
        return bench

    def _say_spent(self, round: int, steps: int, sigma: float | None) -> None:
        if sigma is None:
            self.say(f"round {round}: {steps} steps, without privacy")
        else:
            self.say(f"round {round}: {steps} steps with σ = {sigma:.4g}; with it ε = {self.account.spent:.4g} is spent")

    def _context(self, context: Context, key: dict[str, str] | None = None) -> Context:
        place = UserConfig({"partition-id": self.own.client, messages.EXAMPLES: self.own.examples, **(key or {})})
        return Context(context.run_id, context.node_id, place, RecordDict(), UserConfig())


def identity_of(experiment: Experiment, job: ConfigRecord) -> str:
    """The experiment's name within what a run and all that went on from it have in common."""
    return identity(experiment.config, _words(job, messages.LINEAGE))


def goes_back(config: CheckpointConfig, round: int) -> int:
    """The round after which a server that is broken off in this one stands, with the oldest of its checkpoints."""
    if not config.every:
        return round  # it begins anew
    return max(0, (round - 1) // config.every - config.keep + 1) * config.every


def _sent(message: Message, experiment: Experiment, job: ConfigRecord, arrays: dict) -> Message:
    """The message made anew of what was checked, so that nothing else of it goes any further."""
    checked = dict(job) | {messages.EXPERIMENT: experiment.config.to_json()}
    message.content = RecordDict({messages.ARRAYS: messages.record(arrays), messages.CONFIG: ConfigRecord(checked)})
    return message


def _round(job: ConfigRecord) -> int:
    round = job.get(messages.ROUND)
    if type(round) is not int:
        raise Refused(Reason.MALFORMED, "it has no round")
    return round


def _words(job: ConfigRecord, name: str) -> str:
    text = job.get(name)
    if not isinstance(text, str) or len(text) > WORDS:
        raise Refused(Reason.MALFORMED, f"it has no {name}")
    return text

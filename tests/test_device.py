"""A device by itself: which messages it answers, its owner's limits, what leaves it, and how records come home."""

import ast
import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from clients import app
from clients.private import Mechanism
from clients.task import Task
from fedlora import data
from fedlora.app import experiment, traffic
from fedlora.arrays import messages, sketch
from fedlora.check import ConfigError, RunError
from fedlora.compute import workbench
from fedlora.config import Config, DatasetConfig, TrainConfig
from fedlora.deploy import client, launch, node, preview, server
from fedlora.deploy.account import TRAIN, Account, Permit, Work
from fedlora.deploy.courier import Receiver, Sender
from fedlora.deploy.device import Device
from fedlora.deploy.experiment import LONGEST, read
from fedlora.deploy.holdings import Holdings, identity, localised
from fedlora.deploy.limits import Limits
from fedlora.deploy.node import Connection, Node
from fedlora.deploy.reasons import Reason, Refused, printable
from fedlora.deploy.sums import SecureSums
from fedlora.secure import Identity
from fedlora.server.participation import draw_cohort
from fedlora.server.rollcall import RollCall
from fedlora.validate import from_json
from tests.conftest import ROOT, write_digits
from tests.fuzz import messages as fuzz

LIMITS = Limits(epsilon=8.0, delta=1e-5, clip=1.0, steps=100)
OPEN_HANDED = replace(LIMITS, epsilon=math.inf)
DIGITS = [str(digit) for digit in range(10)]


def test_batches_noise_and_dropout_come_from_the_key_that_a_device_is_given() -> None:
    keys, mechanism = [bytes([k]) * 32 for k in range(3)], Mechanism(1.0, 1.0)
    own = [Task(np.arange(50), TrainConfig(), "B", (1, 3), (0, 2, 1), mechanism, key) for key in keys]
    assert len({tuple(task.noise().standard_normal(3)) for task in own}) == 3
    assert len({tuple(map(tuple, task.batches())) for task in own}) == 3
    assert len({task.derived(purpose) for task in own for purpose in ("batches", "noise", "dropout")}) == 9
    elsewhere = Task(np.arange(50), TrainConfig(), "B", (2, 3), (7, 5, 2), mechanism, keys[0])  # nothing of the server's
    assert np.array_equal(elsewhere.noise().standard_normal(3), own[0].noise().standard_normal(3))
    for missing in ({"mechanism": mechanism}, {"key": keys[0]}):
        with pytest.raises(ValueError, match="a private task has a key of its own"):
            Task(np.arange(50), TrainConfig(), "B", (1, 3), (0, 2, 1), **missing)


@pytest.fixture
def folder(tmp_path):
    write_digits(tmp_path / "data", 2, each=20)
    return tmp_path / "data"


@pytest.fixture
def own(folder):
    holdings = DatasetConfig(name="files", path=str(folder / "device-0.jsonl"), image="image", test_fraction=0.0)
    return preview.data(Holdings(0, 0, holdings, ("vit_digits", None), "cpu", 1.0))


@pytest.fixture
def asked(small):
    """What a server sends; its paths lead nowhere on the device."""

    def make(**overrides) -> Config:
        settings = {
            "clients": 2, "clients_per_round": 2, "deploy": "x", "partition__name": "own", "partition__sizes": [20, 20],
            "dataset__name": "files", "dataset__image": "image", "dataset__classes": DIGITS,
            "dataset__test": "/nowhere/test.jsonl", "privacy__name": "record", "privacy__noise_multiplier": 1.5,
        }  # fmt: skip
        return small(**settings | overrides)

    return make


PLAIN = {"privacy__name": "none", "privacy__noise_multiplier": None}


@pytest.fixture
def made(own, tmp_path):
    """A maker of devices, each with books of its own; `logs` is what they said."""
    accounts: list[Account] = []

    def make(limits: Limits = LIMITS, **holdings) -> Device:
        account = Account(tmp_path / f"state-{len(accounts)}", limits)
        accounts.append(account)
        it = Device(replace(own, **holdings), account)
        it.say = make.logs.append
        return it

    make.logs = []
    yield make
    for account in accounts:
        account.close()


def sent(config: Config, kind: str = MessageType.TRAIN, round: int = 1, **job) -> Message:
    """A server's message, as it comes off the wire; `job` replaces what an honest one says, None removes it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    here = from_json(config.to_json())
    here.dataset.test = None
    bench, strategy = workbench.build(here), experiment.make_strategy(here)
    state = experiment.initial_state(bench, strategy)
    says = strategy.job(round, kind == MessageType.EVALUATE) | {
        messages.EXPERIMENT: config.to_json(), messages.BASE: bench.model.digest, messages.LINEAGE: "a run",
        messages.RANK: config.adapter.rank, messages.ADDS: False,
    }  # fmt: skip
    if config.privacy.name == "record" and kind != MessageType.EVALUATE:
        says[messages.NOISE] = [config.privacy.noise_multiplier or 1.0] * config.clients
    says |= {name.replace("_", "-") if name == "server_round" else name: value for name, value in job.items()}
    record = ConfigRecord({name: value for name, value in says.items() if value is not None})
    content = RecordDict(
        {messages.ARRAYS: messages.record(strategy.sent_down(state)), messages.CONFIG: record}  # type: ignore[arg-type]
    )
    return Message(recorddict_from_proto(recorddict_to_proto(content)), 1, kind)


def place() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


def refusal(reply: Message) -> Reason:
    """The reason of a reply, which must be nothing but one of the fixed sentences."""
    assert reply.has_error() and not reply.has_content()
    return Reason(reply.error.reason)


def log(made) -> str:
    return "\n".join(made.logs)


# ---- which messages are answered, and the one way to the work


OTHER_TYPES = ["train.default", "evaluate.default", "query.default", "query.x", "train.", "train.train", "evaluate.sketch",
    "TRAIN", "train.Sketch", "train.perform", "system", ""]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_a_message_of_another_type_is_refused_and_nothing_of_it_is_read(made, monkeypatch, kind) -> None:
    """Flower's routes take train.default for train: it went past every limit, and nothing was in the ledger."""
    device = made()
    content = SimpleNamespace(metadata=SimpleNamespace(message_type=kind, run_id=1))  # whatever else is asked for raises
    monkeypatch.setattr("fedlora.deploy.device.Message", lambda error, reply_to: SimpleNamespace(error=error))
    assert device(content, place()).error.reason == Reason.NOT_ANSWERED.value
    assert device.account.rows == [] and device._experiment is None


def test_no_work_is_done_without_the_permit_of_the_ledger(made, asked, monkeypatch) -> None:
    device, done = made(), []
    device(sent(asked()), place())
    newest = device.account.in_force
    for permit in (Permit(newest.work, newest.key), Permit(Work(TRAIN, "x", 1), bytes(32))):
        with pytest.raises(Refused):
            device._work(permit, lambda *_: done.append(1), Message(RecordDict(), 1, MessageType.TRAIN), place())
    assert not done


def test_permits_are_made_by_the_ledger_and_work_is_reached_by_one_function() -> None:
    """By the text of the package: who calls `Permit(`, and who names what a ClientApp does with examples."""
    makers, workers = set(), set()
    for file in (ROOT / "fedlora" / "deploy").glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for name in ast.walk(function):
                if isinstance(name, ast.Call) and ast.unparse(name.func) == "Permit":
                    makers.add(f"{file.stem}.{function.name}")
                if isinstance(name, ast.Call) and ast.unparse(name.func).startswith("app.") and file.stem != "server":
                    workers.add(f"{file.stem}.{ast.unparse(name.func)}")
    assert makers == {"account.admit"} and workers == {"device.app.query"}  # a roll call looks at no example


def test_a_private_round_tells_the_update_and_public_numbers_only(made, asked) -> None:
    device = made()
    reply = device(sent(asked()), place())
    assert set(reply.content[messages.METRICS]) == {messages.CLIENT, messages.EXAMPLES, "seconds", "steps"}
    assert {name.rpartition(".lora_")[2] for name in reply.content[messages.ARRAYS]} == {"B.weight"}
    assert len(device.account.rows) == 1


def test_a_round_of_which_two_copies_come_has_other_noise_each_time(made, asked) -> None:
    device, updates = made(), []
    for _ in range(2):
        reply = device(sent(asked()), place())
        updates.append(messages.arrays_of(reply.content[messages.ARRAYS]))
    name = next(iter(updates[0]))
    assert not np.array_equal(updates[0][name], updates[1][name]) and len(device.account.rows) == 2


SKETCHED = {"strategy": {"name": "fedask", "factors": "B"}}


def further(config: Config, action: str, content: dict[str, np.ndarray], **job) -> Message:
    message = sent(config, f"train.{action}", **job)
    message.content[messages.ARRAYS] = messages.record(content)
    return message


def test_further_messages_are_answered_within_the_training_in_force_and_once(made, asked) -> None:
    device, config = made(), asked(**SKETCHED)
    columns = {sketch.COLUMNS: np.array([18])}
    ask = lambda *a, **k: device(further(*a, **k), place())  # noqa: E731
    assert refusal(ask(config, "sketch", columns)) is Reason.OUT_OF_TURN  # nothing was admitted
    assert not device(sent(config), place()).has_error()
    assert refusal(ask(config, "sketch", columns, server_round=2)) is Reason.OUT_OF_TURN
    assert refusal(ask(config, "sketch", columns, lineage="another run")) is Reason.OUT_OF_TURN
    assert refusal(ask(asked(**SKETCHED, seed=1), "sketch", columns)) is Reason.OUT_OF_TURN
    assert refusal(ask(config, "mask", columns)) is Reason.OUT_OF_TURN  # the strategy asks for no sums
    assert refusal(ask(config, "sketch", {sketch.COLUMNS: np.array([64])})) is Reason.INCONSISTENT  # all of the product
    assert refusal(ask(config, "sketch", columns | {"more": np.zeros(1)})) is Reason.INCONSISTENT
    reply = ask(config, "sketch", columns)
    assert all(name.endswith(".sketch") for name in reply.content[messages.ARRAYS])
    assert refusal(ask(config, "sketch", columns)) is Reason.OUT_OF_TURN
    device(sent(asked()), place())
    assert refusal(ask(asked(), "sketch", columns)) is Reason.OUT_OF_TURN  # fedsvd keeps nothing to be asked for
    assert len(device.account.rows) == 2


def test_accuracy_on_private_examples_stays(made, asked) -> None:
    config = asked(evaluate__holdout=0.2)
    assert refusal(made()(sent(config, MessageType.EVALUATE), place())) is Reason.BEYOND_LIMITS
    open_handed = made(OPEN_HANDED)
    reply = open_handed(sent(config, MessageType.EVALUATE), place())
    assert reply.content[messages.METRICS][messages.EXAMPLES] == 4
    assert [row["kind"] for row in open_handed.account.rows] == ["evaluate"] and math.isinf(open_handed.account.spent)
    for other in (asked(), asked(evaluate__holdout=0.2, evaluate__every=2)):
        assert refusal(open_handed(sent(other, MessageType.EVALUATE), place())) is Reason.INCONSISTENT


def test_the_roll_call_tells_number_and_examples(made) -> None:
    reply = made()(Message(RecordDict(), 1, MessageType.QUERY), place())
    assert dict(reply.content[messages.METRICS]) == {messages.CLIENT: 0, messages.EXAMPLES: 20}


# ---- what leaves where it does not do it


def test_what_is_answered_has_nothing_of_the_data_or_the_message_in_it(made, asked) -> None:
    """A server that names classes got back which row has another label; a malformed array the batch's size and length."""
    device, canary = made(), "canary\x1b[2J"
    broken = sent(asked())
    name = next(iter(broken.content[messages.ARRAYS]))
    arrays = dict(broken.content[messages.ARRAYS])
    shapes = [np.zeros((3, 5), np.float32), np.zeros((64, 8), np.int64), np.full((64, 8), np.nan, np.float32)]
    damages = [arrays | {name: Array(array)} for array in shapes]
    damages += [arrays | {name: Array("float32", (64, 8), "numpy.ndarray", data)} for data in (b"", b"canary", bytes(500))]
    damages += [arrays | {canary: Array(shapes[0])}, arrays | {f"{name}|int8": Array(np.zeros(9, np.uint8))}]
    reasons = []
    for damaged in damages:
        message = sent(asked())
        message.content[messages.ARRAYS] = ArrayRecord(damaged)
        reasons.append(refusal(device(message, place())))
    assert set(reasons) == {Reason.INCONSISTENT, Reason.MALFORMED}
    for changed in ({"dataset__classes": [*DIGITS[:9], canary]}, {"model__path": canary}, {"train__steps": 10**6}):
        message = sent(asked())
        message.content[messages.CONFIG][messages.EXPERIMENT] = asked(**changed).to_json()
        if "model__path" not in changed:  # the device has a base model of its own
            refusal(device(message, place()))
    assert device.account.rows == [] and "canary" in log(made) and "\x1b" not in log(made)
    for sentence in Reason:
        assert not any(character.isdigit() for character in sentence.value) and sentence.value.isprintable()


def test_damaged_messages_are_answered_by_fixed_sentences(tmp_path) -> None:
    """A few of those that `python -m tests.fuzz messages` sends."""
    with fuzz.part(tmp_path) as case:
        answers = sum((case(seed) for seed in range(6)), Counter())
    assert answers["malformed"] > 100 and answers["inconsistent"] > 40 and answers["answered"] > 40


def test_what_fails_within_the_training_says_no_more(made, asked, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("Expected input batch_size (3) to match target batch_size (7)")

    monkeypatch.setattr(app, "train", fails)
    device = made()
    assert refusal(device(sent(asked()), place())) is Reason.FAILED
    assert "batch_size (3)" in log(made) and len(device.account.rows) == 1


def test_our_own_sentences_are_logged_without_a_class_in_front(made, asked, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RunError("this device has trained nothing for a secure sum")

    monkeypatch.setattr(app, "train", fails)
    assert refusal(made()(sent(asked()), place())) is Reason.FAILED
    assert log(made).endswith("not done (failed): this device has trained nothing for a secure sum")


def test_a_log_line_is_one_line_and_short() -> None:
    assert printable("a\x1b[2Jb\nc" + "x" * 10**6)[:6] == "a [2Jb" and len(printable("x" * 10**6)) == 501


def test_the_file_is_read_when_its_owner_starts_the_device_and_never_for_a_message(made, asked, folder) -> None:
    device, received = made(), [sent(config) for config in (asked(), asked(seed=3), asked(train__lr=0.1))]
    workbench.build(localised(device.own, asked()))  # as the preview does
    (folder / "device-0.jsonl").unlink()
    for message in received:
        assert not device(message, place()).has_error(), log(made)


def test_no_example_is_looked_at_before_the_ledger_has_the_round(made, asked, monkeypatch) -> None:
    device, looked = made(), []
    examples = workbench.Workbench.examples_of
    monkeypatch.setattr(workbench.Workbench, "examples_of", lambda *a: looked.append(len(device.account.rows)) or examples(*a))
    for message in (sent(asked(), noise=[0.1, 0.1]), sent(asked(), base="x"), sent(asked(privacy__noise_multiplier=0.3))):
        looked.clear()
        device(message, place())
        looked_by_refused = list(looked)
        assert device.account.rows == [] and looked_by_refused == []
    device(sent(asked()), place())
    assert set(looked) == {1}


# ---- the owner's limits


def test_what_belongs_to_the_device_is_never_the_servers(own, asked) -> None:
    here = localised(own, asked(device="cuda", threads=1, model__path="/etc", dataset__text=None))
    assert (here.device, here.dataset, here.model.path) == ("cpu", own.data, None)
    assert here.train == asked().train and here.privacy == asked().privacy


@pytest.mark.parametrize(
    ("settings", "reason", "details"),
    [
        ({"privacy__clip": 1.5}, Reason.BEYOND_LIMITS, "clips at 1 or below (--clip), the experiment has privacy.clip=1.5"),
        ({"privacy__delta": 1e-4}, Reason.BEYOND_LIMITS, "allows δ = 1e-05 (--delta), the experiment has privacy.delta=0.0001"),
        (PLAIN, Reason.BEYOND_LIMITS, "trains with privacy=record only"),
        ({"privacy__noise_multiplier": 0.1}, Reason.SPENT, "above its own budget of 8"),
        ({"privacy__noise_multiplier": 0.0}, Reason.SPENT, "above its own budget of 8"),
        ({"train__steps": 101}, Reason.BEYOND_LIMITS, "at most 100 steps a round (--max-steps), the experiment asks for 101"),
        ({"train__epochs": 51}, Reason.BEYOND_LIMITS, "the experiment asks for 102"),
        ({"adapter__rank": 257}, Reason.BEYOND_LIMITS, "adapter.rank=256 at most (--max-rank), the experiment has 257"),
        ({"adapter__rank": 1000}, Reason.BEYOND_LIMITS, "the experiment has 1000"),
        ({"threads": 512}, Reason.BEYOND_LIMITS, "(--max-threads)"),
        ({"clients": 10**6}, Reason.BEYOND_LIMITS, "(--max-clients)"),
        ({"rounds": 10**5}, Reason.BEYOND_LIMITS, "(--max-rounds)"),
        ({"dataset__image": None, "dataset__text": "text"}, Reason.NOT_HELD, "holds images, the experiment is for text"),
        ({"dataset__classes": ["a", "b"]}, Reason.NOT_HELD, "the experiment is for ['a', 'b']"),
        ({"model__name": "hf", "model__path": "x"}, Reason.NOT_HELD, "holds the model vit_digits, the experiment is for hf"),
    ],
)  # fmt: skip
def test_an_experiment_beyond_the_owners_limits_is_refused_and_costs_nothing(made, asked, settings, reason, details) -> None:
    message, device, built = sent(asked()), made(), workbench.build_from.cache_info().misses
    message.content[messages.CONFIG][messages.EXPERIMENT] = asked(**settings).to_json()
    message.content[messages.CONFIG][messages.NOISE] = [settings.get("privacy__noise_multiplier", 1.5) or 0.0] * 2
    assert refusal(device(message, place())) is reason and details in log(made)
    assert device.account.rows == []
    assert reason is Reason.SPENT or workbench.build_from.cache_info().misses == built  # nothing was built for it


def test_a_text_that_is_no_experiment_is_refused(made, asked) -> None:
    whole = asked().to_json()
    damaged = [
        whole.replace('"batch_size": 16', f'"batch_size": {value}')
        for value in ("-1", '"16"', "1e999", "true", "null", "[16]", "1" + 400 * "0")
    ]
    damaged += ["", "{", "[]", "7", "null", "[" * 100_000, '{"nothing": 1}', whole.replace('"fedsvd"', '"no such"')]
    damaged += [
        whole.replace('"model": {', '"model": 7, "x": {'),
        whole.replace('"name": "fedsvd"', '"name": "fedsvd", "seed": 7'),
    ]
    device = made()
    for text in damaged:
        message = sent(asked())
        message.content[messages.CONFIG][messages.EXPERIMENT] = text
        assert refusal(device(message, place())) is Reason.MALFORMED, text[:80]
    message.content[messages.CONFIG][messages.EXPERIMENT] = whole + " " * LONGEST
    assert refusal(device(message, place())) is Reason.BEYOND_LIMITS
    assert device.account.rows == [] and read(whole) == asked()


def test_one_experiment_is_kept_however_many_are_sent(made, asked) -> None:
    device = made()
    for rounds in range(3, 6):
        assert not device(sent(asked(rounds=rounds)), place()).has_error()
        assert workbench.build_from.cache_info().currsize == 1 and device._experiment.config.rounds == rounds
    others = device._experiment.config.partition.sizes
    assert others == [20, 0]  # what others have takes no memory here


def test_a_round_that_takes_too_long_is_broken_off(made, asked, monkeypatch) -> None:
    device, before = made(replace(LIMITS, seconds=0.3)), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(app, "train", lambda *_: time.sleep(60))
    message = sent(asked())
    began = time.monotonic()
    assert refusal(device(message, place())) is Reason.BEYOND_LIMITS
    assert time.monotonic() - began < 20 and "longer than 0.3 s (--max-seconds)" in log(made)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_no_handler_of_exceptions_goes_on_when_time_is_up(made, asked, monkeypatch) -> None:
    """Model libraries, and we, catch whatever data and models make them raise."""

    def train(*_: object) -> None:
        try:
            time.sleep(60)
        except Exception:
            return

    monkeypatch.setattr(app, "train", train)
    device = made(replace(LIMITS, seconds=0.3))
    assert refusal(device(sent(asked()), place())) is Reason.BEYOND_LIMITS
    assert "longer than 0.3 s (--max-seconds)" in log(made)


def test_arrays_that_take_more_than_a_part_of_the_owners_memory_are_refused_unread(made, asked) -> None:
    """And encoded ones of another shape than the experiment's before anything of that shape is made."""
    message = sent(asked())
    size = messages.array_bytes(message.content)
    assert refusal(made(replace(LIMITS, memory=4 * size - 4))(message, place())) is Reason.MALFORMED
    assert f"{size} bytes of arrays are more than {size - 1}" in log(made)
    claim = np.frombuffer(np.array([2, 64, 70000], "<u4").tobytes() + bytes(4 * 64 + 64 * 35000), np.uint8)
    name = next(iter(message.content[messages.ARRAYS]))
    encoded = sent(asked(compression__down="int4"))
    encoded.content[messages.ARRAYS] = messages.record({f"{name}|int4": claim})
    assert refusal(made()(encoded, place())) is Reason.MALFORMED and f"{name} has shape (64, 70000) instead of" in log(made)
    assert not made(replace(LIMITS, memory=4 * size))(sent(asked()), place()).has_error()


def test_more_memory_than_the_owner_allows_is_refused_and_the_device_lives(made, asked, monkeypatch) -> None:
    device, before = made(), resource.getrlimit(resource.RLIMIT_DATA)
    message, real = sent(asked()), app.train
    monkeypatch.setattr(app, "train", lambda *_: np.ones(10**10))
    try:
        replace(LIMITS, memory=8 * 10**9).bound_memory()
        assert refusal(device(message, place())) is Reason.FAILED and "MemoryError" in log(made)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    monkeypatch.setattr(app, "train", real)
    assert not device(sent(asked()), place()).has_error()


def test_a_base_model_with_other_weights_than_the_servers_is_refused_and_costs_nothing(made, asked) -> None:
    """One weight is enough, in its last bit; what was trained before is no part of the base."""
    first, second, device = sent(asked()), sent(asked()), made()
    assert not device(first, place()).has_error()
    model = workbench.build(localised(device.own, asked())).model
    weights = dict(model.peft.named_parameters())["base_model.model.vit.layers.0.attention.k_proj.weight"].data
    before = weights[0, 0].item()
    try:
        weights[0, 0] = float(np.nextafter(np.float32(before), np.float32(1)))
        del model.digest  # it is remembered
        assert refusal(device(second, place())) is Reason.OTHER_BASE
        assert "this device's weights of vit_digits are others than the server's (SHA-256" in log(made)
    finally:
        weights[0, 0] = before
        del model.digest
    assert refusal(device(sent(asked(), base=None), place())) is Reason.MALFORMED
    assert len(device.account.rows) == 1


# ---- what follows from the experiment


@pytest.mark.parametrize(
    "said",
    [
        {"personal": "B"}, {"personal": "A"}, {"trains": "AB"}, {"sends": "AB"}, {"sends": ""}, {"init": "orthonormal"},
        {"drawn": 1}, {"silent": True}, {"keeps": True}, {"changes": True}, {"encodes": "int8"}, {"share": 0.5}, {"share": 1},
        {"rank": 4}, {"rank": 10**6}, {"rank": None}, {"trains": None}, {"silent": 0}, {"noise-multipliers": [1.4999, 1.5]},
        {"noise-multipliers": [1.5]}, {"noise-multipliers": [math.nan, 1.5]}, {"noise-multipliers": [-1.5, 1.5]},
        {"noise-multipliers": 1.5}, {"noise-multipliers": None}, {"server_round": 0}, {"server_round": 3}, {"else": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("agreed", [False, True], ids=["any", "agreed"])
def test_a_message_that_says_what_its_experiment_does_not_say_is_refused(made, asked, said, agreed) -> None:
    """With --experiment a server could switch secure sums off, ask for a personal factor, or lower σ, in the flags."""
    device = made(agreed=asked() if agreed else None)
    assert refusal(device(sent(asked(), **said), place())) is Reason.INCONSISTENT
    assert device.account.rows == []


def test_secure_sums_that_the_experiment_has_cannot_be_switched_off(made, asked) -> None:
    config = asked(aggregation="secure", strategy={"name": "ffa_lora"})
    device = made(agreed=config)
    peers = {k: generate_private_key(SECP384R1()) for k in range(2)}
    identity = Identity(0, peers[0], {k: key.public_key() for k, key in peers.items()})
    device.sums = SecureSums(identity, device.account.folder)
    assert refusal(device(sent(config, silent=False), place())) is Reason.INCONSISTENT
    assert refusal(device(sent(config, silent=False, keeps=False), place())) is Reason.INCONSISTENT
    reply = device(sent(config), place())
    assert not reply.has_error() and not reply.content[messages.ARRAYS]


def test_a_record_more_or_less_and_a_round_of_another_type_are_malformed(made, asked) -> None:
    device, messages_ = made(), [sent(asked()) for _ in range(4)]
    messages_[0].content["more"] = MetricRecord({"x": 1})
    del messages_[1].content[messages.ARRAYS]
    messages_[2].content[messages.ARRAYS] = ConfigRecord({})
    messages_[3].content[messages.CONFIG][messages.ROUND] = "1"
    assert [refusal(device(message, place())) for message in messages_] == [Reason.MALFORMED] * 4
    assert device.account.rows == []


def test_noise_below_what_keeps_the_experiments_epsilon_is_refused(made, asked) -> None:
    """σ is derived on both sides, and may differ within the search's tolerance; what counts is the ε that is promised."""
    from fedlora.privacy.calibration import noise_multiplier

    config = asked(privacy__noise_multiplier=None, privacy__epsilon=3.0)
    sigma = noise_multiplier(3.0, 1e-5, 16 / 20, 2 * 2)
    low, enough = made(), made()
    assert refusal(low(sent(config, **{messages.NOISE: [0.98 * sigma, sigma]}), place())) is Reason.INCONSISTENT
    assert low.account.rows == [] and "does not keep privacy.epsilon=3.0" in log(made)
    for stated in (sigma, 1.001 * sigma):
        assert not enough(sent(config, **{messages.NOISE: [stated, 0.0]}), place()).has_error()
    assert [row["noise_multiplier"] for row in enough.account.rows] == [sigma, 1.001 * sigma]


def test_a_private_round_that_the_seed_does_not_draw_the_device_in_is_refused(made, asked) -> None:
    config = asked(clients=3, clients_per_round=1, rounds=9, partition__sizes=[20] * 3)
    device, drawn = made(), [round for round in range(1, 10) if 0 in draw_cohort(config.seed, round, [0, 1, 2], 1)]
    assert 0 < len(drawn) < 9
    answered = [round for round in range(1, 10) if not device(sent(config, round=round), place()).has_error()]
    assert answered == drawn == [row["round"] for row in device.account.rows]
    assert "does not draw client 0 in round" in log(made)


def test_a_device_that_agreed_to_an_experiment_trains_as_often_as_that_draws_it(made, asked) -> None:
    """A round that is taken again counts too: what the owner was told that it costs is all that it costs."""
    device, free = made(agreed=asked()), made()
    replies = [[it(sent(asked(), round=round), place()).has_error() for round in (1, 1, 2)] for it in (device, free)]
    assert replies == [[False, False, True], [False, False, False]]
    assert "has trained 2 times for the experiment that was agreed to" in log(made)


def test_only_the_experiment_that_was_agreed_to(made, asked) -> None:
    simulated = asked(name="other", deploy="elsewhere", partition__sizes=[], dataset__classes=DIGITS[::-1])
    device = made(agreed=simulated)
    assert not device(sent(asked()), place()).has_error()
    assert refusal(device(sent(asked(train__lr=0.1)), place())) is Reason.NOT_AGREED
    assert refusal(device(sent(asked(privacy__noise_multiplier=1.6)), place())) is Reason.NOT_AGREED
    assert identity(simulated) == identity(asked())


# ---- the connection


def test_a_device_that_the_server_does_not_take_yet_tries_again(tmp_path, monkeypatch, capsys) -> None:
    """One that was killed counts as connected for about a minute, and Flower ends the SuperNode of the new one."""
    monkeypatch.setattr(node, "RETRY", 0.05)
    count = f"import pathlib, sys; p = pathlib.Path(r'{tmp_path}/tries'); p.open('a').write('x'); sys.exit(%s)"
    tries = lambda: len((tmp_path / "tries").read_text())  # noqa: E731
    monkeypatch.setattr(Node, "_command", lambda self: [sys.executable, "-c", count % "0 if p.stat().st_size > 2 else 1"])
    connection = Connection("127.0.0.1:1", None, None, True, 60.0, 1)
    with Node(connection, tmp_path) as connected:
        assert connected.serve(lambda *_: None) == 0 and tries() == 3
    assert capsys.readouterr().out.count("an earlier connection of it ended. Trying again for") == 2
    monkeypatch.setattr(Node, "_command", lambda self: [sys.executable, "-c", count % 1])
    with Node(replace(connection, wait=0.0), tmp_path) as given_up:
        assert given_up.serve(lambda *_: None) == 1 and tries() == 4
    assert (tmp_path / "runtime-secret").stat().st_mode & 0o777 == 0o600


# ---- what it says before it connects


def arguments_of(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "--superlink", "x:1", "--client", "0", "--data", str(folder / "device-0.jsonl"), "--image", "image", "--epsilon", "8",
        "--state", str(tmp_path / "s"), "--device", "cpu", "--check", *more
    ]  # fmt: skip


@pytest.fixture
def unbounded(monkeypatch):
    """This process is the tests' own."""
    bounds: list[int] = []
    monkeypatch.setattr(Limits, "bound_memory", lambda limits: bounds.append(limits.memory))
    return bounds


def test_the_preview_says_what_leaves_the_device_and_what_it_costs(folder, own, asked, tmp_path, capsys, unbounded) -> None:
    private = {"privacy__noise_multiplier": None, "privacy__epsilon": 3.0, "rounds": 2}
    simulated = {"deploy": None, "partition__name": "iid", "partition__sizes": [], "dataset__path": "/nowhere/all.jsonl"}
    config = asked(**private | simulated)
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = arguments_of(folder, tmp_path, "--memory", "3.5")
    assert client.main([*arguments, "--experiment", str(tmp_path / "config.json")]) == 0
    said = capsys.readouterr().out
    bench = workbench.build(localised(own, config))
    strategy = experiment.make_strategy(config)
    state = experiment.initial_state(bench, strategy)
    up = traffic.bytes_up(state, strategy)
    assert "20 examples" in said and f"{up / 1000:.1f} kB" in said and "8 arrays" in said
    assert "costs: ε = 2.9" in said and "4 steps)" in said and "for each record, added or removed" in said
    assert unbounded == [3_500_000_000] and "rank 256" in said and "3.5 GB of memory" in said
    for option, value in (("--epsilon", "0"), ("--max-rank", "0"), ("--memory", "-1"), ("--max-seconds", "nan")):
        assert client.main([*arguments, option, value]) == 2
        assert f"{option}=" in capsys.readouterr().err
    assert client.main([*arguments, "--max-rank", "4", "--experiment", str(tmp_path / "config.json")]) == 1
    assert "adapter.rank=4 at most (--max-rank), the experiment has 8" in capsys.readouterr().err


def test_classes_are_the_owners_to_declare(folder, tmp_path, capsys, unbounded) -> None:
    """A label that is none of them is told the owner when the device starts, and no server."""
    arguments = arguments_of(folder, tmp_path)
    assert client.main(arguments) == 0  # those of the embedded model
    assert client.main([*arguments, "--classes", "1,2,3"]) == 2
    assert "--classes" in (said := capsys.readouterr().err) and "none of dataset.classes=1,2,3" in said
    (tmp_path / "notes.jsonl").write_text('{"text": "x", "label": "no"}\n{"text": "y", "label": "yes"}\n')
    notes = [*arguments[:4], "--data", str(tmp_path / "notes.jsonl"), "--text", "text", "--model", "/nowhere", "--epsilon", "8"]
    notes += ["--state", str(tmp_path / "s"), "--check"]
    assert client.main(notes) == 2
    assert "--classes is missing; name all labels of the federation" in (said := capsys.readouterr().err)
    assert "has --classes no,yes" in said


def test_a_bound_on_memory_that_is_taken_already_is_one_sentence(folder, tmp_path, capsys) -> None:
    assert client.main(arguments_of(folder, tmp_path, "--memory", "0.01")) == 2
    assert "--memory=0.01 GB is too little: program, model and data take" in capsys.readouterr().err
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


# ---- data that are not all in one place


def test_named_classes_let_a_file_lack_some_and_a_server_have_no_training_data(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "no"}\n{"text": "y", "label": "no"}\n')
    file = DatasetConfig(name="files", text="text", test_fraction=0.0, classes=["yes", "no", "maybe"])
    mine = data.load(DatasetConfig(**vars(file) | {"path": str(tmp_path / "a.jsonl")}), 0)
    assert mine.classes == ["yes", "no", "maybe"] and mine.train.labels.tolist() == [1, 1] and len(mine.test) == 0
    server = data.load(DatasetConfig(**vars(file) | {"test": str(tmp_path / "a.jsonl")}), 0)
    assert server.classes == mine.classes and len(server.train) == 0 and len(server.test) == 2
    assert len(data.load(file, 0).test) == 0
    with pytest.raises(ConfigError, match=r"is 'no' in row 1 of .*, none of dataset.classes=yes,maybe"):
        data.load(DatasetConfig(**vars(file) | {"path": str(tmp_path / "a.jsonl"), "classes": ["yes", "maybe"]}), 0)


def test_a_device_numbers_classes_as_the_experiment_does(own, asked) -> None:
    """Their order is that of the model's outputs; the owner and the server may each have named them in another."""
    own = replace(own, data=replace(own.data, classes=DIGITS[::-1]))
    assert localised(own, asked()).dataset.classes == DIGITS


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["partition=iid"], "partition=iid does not go with deploy"),
        (["dataset.path=x.csv"], "dataset.path=x.csv does not go with deploy"),
        (["dataset.classes=[]"], "dataset.classes=[]; name all labels"),
        (["dataset=digits"], "dataset.text=text is not read with dataset=digits; set dataset=files"),
        (["min_online=60"], "min_online=60 is more than clients=50"),
    ],
)
def test_settings_that_do_not_go_with_devices_are_refused_in_one_sentence(overrides, sentence, capsys) -> None:
    from fedlora.tools import cli

    usual = ["deploy=here", "dataset=files", "dataset.text=text", "dataset.classes=[a,b]", "model=hf", "model.path=x"]
    assert cli.main(ROOT / "configs", [*usual, *overrides]) == 2
    assert sentence in capsys.readouterr().err
    assert cli.main(ROOT / "configs", ["deploy=here"]) == 2
    assert "deploy=here does not go with dataset=digits; set dataset=files" in capsys.readouterr().err


# ---- the roll call, and the plan that follows from it


class Devices:
    """A grid of devices that answer the roll call; node → (client, examples)."""

    def __init__(self, nodes: dict[int, tuple[int, int]]) -> None:
        self.nodes = nodes

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, asked, *, timeout=None):
        for message in asked:
            client, examples = self.nodes[message.metadata.dst_node_id]
            metrics = MetricRecord({messages.CLIENT: client, messages.EXAMPLES: examples})
            reply = Message(RecordDict({messages.METRICS: metrics}), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            yield reply


def test_a_run_begins_when_each_number_has_a_device_of_its_own(small, monkeypatch) -> None:
    """A second device with a number is named at once, and is another client when it has been given its own number."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    config, said = small(clients=2, clients_per_round=2, patience=1e-9), []
    devices, roll = Devices({7: (0, 20), 5: (0, 30), 9: (4, 40)}), RollCall(0.0, 2, said.append)
    with pytest.raises(RunError, match="client 1 of clients=2 did not say who it is"):
        server.sizes(devices, config, roll)
    assert [line.split(";")[0] for line in said] == [
        "node 7 takes no part: it says that it is client 0, which is node 5",
        "node 9 takes no part: it says that it is client 4, and there are clients=2, counted from 0",
    ]
    monkeypatch.setattr(server.time, "sleep", lambda seconds: devices.nodes.update({7: (1, 20)}))
    config.patience = 60.0
    assert server.sizes(devices, config, roll) == [30, 20]
    assert roll.client == {5: 0, 7: 1} and list(roll.refused) == [9] and len(said) == 2


def test_the_plan_of_a_deployment_needs_no_examples(asked, capsys) -> None:
    """σ and bytes follow from the numbers of examples; time and the memory of a step are left to the devices."""
    config = asked(plan=True, privacy__noise_multiplier=None, privacy__epsilon=3.0, partition__sizes=[20, 64])
    config.dataset.test = None
    estimate, noise = experiment.foretell(config)
    said = capsys.readouterr().out
    assert noise.startswith("σ = ") and noise.split(" = ")[1] in said
    assert estimate.traffic.trainings == 4 and estimate.steps == 8 and math.isnan(estimate.seconds)
    strategy = experiment.make_strategy(config)
    state = experiment.initial_state(workbench.build(config), strategy)
    assert estimate.up == 4 * traffic.bytes_up(state, strategy)
    assert "20 to 64, 42 at the median" in said and "bytes of the run" in said
    assert "time" not in said and "activations" not in said


# ---- the way home


@pytest.fixture
def flower(monkeypatch):
    """Stands in for Flower's command line: its answers one after another, and what it was asked for."""
    asked, answers = [], []

    def flwr(*arguments: str) -> subprocess.CompletedProcess:
        asked.append(arguments[:2])
        answer = answers.pop(0)
        return subprocess.CompletedProcess(arguments, 0, answer() if callable(answer) else answer, "")

    monkeypatch.setattr(launch, "flwr", flwr)
    monkeypatch.setattr(launch, "_log", lambda number, connection: (line for line in ["fedlora 0 say hello\n", "bye\n"]))
    monkeypatch.setattr(launch, "RETRY", 0.0)
    return asked, answers


AWAY = json.dumps({"success": False, "error-message": "SuperLink is unavailable."})
STARTED = json.dumps({"success": True, "run-id": "77"})
OVER = json.dumps({"success": True, "runs": [{"status": "finished:completed", "status-details": ""}]})


def test_a_superlink_out_of_reach_for_a_moment_does_not_end_the_command(flower, asked, capsys) -> None:
    questions, answers = flower
    answers[:] = [AWAY, AWAY, OVER]
    said = []
    receiver = Receiver(said.append, said.append, lambda name, content: None)
    assert launch.follow(asked(), "77", receiver) == "finished:completed, bye" and said == ["hello"]
    assert questions == [("list", "x")] * 3
    assert capsys.readouterr().out.splitlines() == [
        "flwr list failed: SuperLink is unavailable; trying again for patience=600 s, while the run goes on"
    ]
    answers[:] = [AWAY, AWAY]
    with pytest.raises(RunError, match="flwr list failed: SuperLink is unavailable, for patience=1e-09 s; the run may go on"):
        launch.follow(asked(patience=1e-9), "77", receiver)


def test_ctrl_c_while_a_run_is_being_started_stops_it_too(flower, asked) -> None:
    """Its number comes after the key was pressed, and it must not be left running."""
    questions, answers = flower

    def pressed() -> str:
        signal.raise_signal(signal.SIGINT)
        return STARTED

    answers[:] = [pressed, ""]
    with pytest.raises(KeyboardInterrupt):
        launch.start(asked(), ROOT)
    assert questions == [("run", str(ROOT)), ("stop", "77")]


def test_records_come_home_whole_once_and_never_elsewhere(tmp_path) -> None:
    home, lines = tmp_path / "run", []
    (home / "adapter").mkdir(parents=True)
    (home / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 500)  # of several pieces
    (home / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"rou')
    sender = Sender(home, lines.append)
    print("hello", "there", file=sender)
    sender.rounds()
    sender.rounds()
    sender.files("adapter")
    sender.files("absent")
    said, rows, files = [], [], {}
    receiver = Receiver(said.append, rows.append, files.__setitem__)
    assert not receiver.take("INFO: of Flower's\n")
    for line in (*lines[:2], *lines):  # a log that is read again from its beginning
        assert receiver.take(line)
    assert said == ["hello there"] and rows == ['{"round": 0}', '{"round": 1}']
    assert files == {"adapter/adapter_model.safetensors": bytes(range(256)) * 500}
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(RunError, match="outside the results folder"):
            Receiver(said.append, rows.append, files.__setitem__).take(f"fedlora 0 end {name}\n")


def test_a_reply_that_flower_cannot_read_leaves_the_others() -> None:
    class Pulled:
        def push_messages(self, messages):
            return ["a", "b", "c"]

        def pull_messages(self, numbers):
            if "b" in numbers:
                raise ValueError("Unexpected set of `children`\x1b[2J")
            return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=number)) for number in numbers]

    replies = server.send_and_receive(Pulled(), [], timeout=5.0)
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["a", "c"]

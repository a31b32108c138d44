"""Every strategy through Flower's own `start`, on a grid whose clients are pure functions: order, failures, bytes."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import strategies
from clients import asked
from clients.start import TRAINED
from fedlora import seeds
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.check import RunError
from fedlora.server.participation import draw_cohort
from strategies import LoRAStrategy

LAYERS = {"model.query": (6, 5), "model.value": (7, 5)}
RANK, HEAD, CLIENTS = 2, 3, 5
Client = Callable[[int, Message], RecordDict | None]  # (client, message) → its reply, or None for no reply at all
every_strategy = pytest.mark.parametrize("name", strategies.names())


class StubGrid(Grid):
    """Calls `client` for every message. With `shuffle`, node ids are random and replies come in random order."""

    def __init__(self, client: Client, clients: int = CLIENTS, shuffle: int | None = None, message_ids: bool = True) -> None:
        self.client, self.message_ids = client, message_ids
        self.random = random.Random(shuffle)
        self.shuffled = shuffle is not None
        self.nodes: dict[int, int] = {}  # node id → client
        self.seen: list[Message] = []
        for number in range(clients):
            self.join(number)

    def join(self, client: int) -> None:
        self.nodes[self.random.getrandbits(62) if self.shuffled else 100 + client] = client

    def get_node_ids(self) -> Iterable[int]:
        return self.random.sample(list(self.nodes), len(self.nodes)) if self.shuffled else list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = [reply for message in messages if (reply := self._call(message)) is not None]
        return self.random.sample(replies, len(replies)) if self.shuffled else replies

    def _call(self, message: Message) -> Message | None:
        if self.message_ids:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())  # as Flower's grids do
        self.seen.append(message)
        try:
            content = self.client(self.nodes[message.metadata.dst_node_id], message)
        except Exception as error:  # as Flower's workers do
            return Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        return None if content is None else Message(content, reply_to=message)

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **keywords: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def outside_of_flower() -> Iterator[None]:
    """A Message can only be made by a task that says who it is; restored for the tests of other files."""
    before = {key: getattr(TaskIdentity, f"_{key}") for key in ("task_id", "run_id", "node_id")}
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    yield
    for key, value in before.items():
        setattr(TaskIdentity, f"_{key}", value)


def initial(name: str = "fedavg", seed: int = 0) -> ArrayRecord:
    """What a run of that strategy begins with: R too, where it is trained, and no head where clients keep theirs."""
    rng, chosen = np.random.default_rng(seed), strategies.strategy_class(name)
    mixes = "R" in chosen.trains
    adapters: Adapters = {
        layer: Pair(rng.standard_normal((RANK, n)).astype(np.float32), np.full((m, RANK), mixes, np.float32))
        for layer, (m, n) in LAYERS.items()
    }
    dense = {} if chosen.personal else {"head": np.zeros(HEAD, np.float32)}
    if mixes:
        dense |= {messages.rotation(layer): np.zeros((RANK, RANK), np.float32) for layer in LAYERS}
    return messages.pack(adapters, dense)


def trained(client: int, message: Message, sends: str | None = None, examples: Any = None) -> RecordDict:
    """What a client sends: the factors that it is asked for, or `sends`, and the head.

    What it trains is moved by its own random stream of this round.
    """
    factors, dense, _ = messages.unpack(message.content.array_records[messages.ARRAYS])
    job = message.content.config_records[messages.CONFIG]
    rng = seeds.stream(0, "test", client, cast(int, job[messages.ROUND]))
    arrays = {
        f"{layer}.lora_{factor}.weight": pair[factor]
        + (factor in str(job[messages.TRAINS])) * rng.standard_normal(pair[factor].shape).astype(np.float32)
        for layer, pair in factors.items()
        for factor in (str(job.get(messages.SENDS, "")) if sends is None else sends)
    }
    for name, array in dense.items():
        mixes = name.endswith("lora_R.weight")
        arrays[name] = array + (rng.standard_normal(array.shape).astype(np.float32) if mixes else np.float32(client))
    metrics = {messages.EXAMPLES: 10 + client if examples is None else examples, "loss": 1.0 / (1 + client)}
    return RecordDict({"arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}), "metrics": MetricRecord(metrics)})


def honest(sends: str | None = None) -> Client:
    """Clients that train, test, answer and say which client they are, as those of this project do."""
    kept: dict[int, RecordDict] = {}

    def client(number: int, message: Message) -> RecordDict | None:
        kind, state = message.metadata.message_type, kept.setdefault(number, RecordDict())
        if kind == "query":
            return RecordDict({"metrics": MetricRecord({messages.CLIENT: number})})
        if kind == "evaluate":
            return RecordDict({"metrics": MetricRecord({messages.EXAMPLES: number, "accuracy": number % 10 / 10})})
        job, arrays = message.content.config_records[messages.CONFIG], message.content.array_records[messages.ARRAYS]
        if kind != "train":
            answer = asked.answer(kind.removeprefix("train."), number, state, job, messages.arrays_of(arrays))
            return RecordDict({"arrays": messages.record(answer), "metrics": MetricRecord({messages.CLIENT: number})})
        if job[messages.KEEPS]:
            state[TRAINED] = trained(number, message, str(job[messages.TRAINS]))["arrays"]
        return trained(number, message, sends)

    return client


def make(name: str, **keywords: Any) -> LoRAStrategy:
    """Of clients that do what any strategy needs, as `honest` ones do, and are sent everything."""
    usual = {"min_train_nodes": 1, "min_available_nodes": CLIENTS, "beyond_peft": True}
    return strategies.make(name, **usual | keywords)


def arrays_of(record: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in record.items()}


def play(strategy: LoRAStrategy, grid: Grid, rounds: int = 3) -> list[dict[str, bytes]]:
    """The global arrays before the first round and after each, as bytes."""
    history: list[dict[str, bytes]] = []
    start, job = initial(strategy.name), ConfigRecord({messages.EXPERIMENT: '{"seed": 0}'})
    keep = lambda _, arrays: history.append(arrays_of(arrays))  # noqa: E731
    strategy.start(grid, start, rounds, train_config=job, evaluate_fn=keep)
    assert len(history) == rounds + 1
    return history


# ---- order


@every_strategy
@pytest.mark.parametrize("shuffle", [1, 2, 3])
@pytest.mark.parametrize("message_ids", [True, False])
def test_node_ids_and_arrival_order_change_no_bit(name: str, shuffle: int, message_ids: bool) -> None:
    """3 of 5 clients a round: the same clients are drawn and merged in the same order on any grid."""
    ordered, shuffled = make(name, fraction_train=0.6), make(name, fraction_train=0.6)
    expected = play(ordered, StubGrid(honest()))
    got = play(shuffled, StubGrid(honest(), shuffle=shuffle, message_ids=message_ids))
    assert got == expected
    assert expected[0] != expected[1] != expected[2] != expected[3]
    assert ordered.report is not None and shuffled.report is not None
    assert ordered.report.cohort == shuffled.report.cohort == draw_cohort(0, 3, list(range(CLIENTS)), 3)


@every_strategy
def test_one_strategy_started_twice_starts_afresh(name: str) -> None:
    """The second run begins at the arrays it is given, not at what the first one left."""
    strategy = make(name)
    first = play(strategy, StubGrid(honest()))
    assert play(strategy, StubGrid(honest(), shuffle=4)) == first


@every_strategy
def test_a_started_strategy_does_what_merge_says(name: str) -> None:
    """The arrays after round 1 are those of `merge` on what the clients sent, and the head is averaged by examples."""
    strategy, grid = make(name), StubGrid(honest())
    play(strategy, grid, rounds=1)
    assert strategy.state is not None
    before = messages.state_of(initial(name), 1.0)
    trains = strategy.trained(1) if strategy.two_phase else None
    sent = [trained(grid.nodes[m.metadata.dst_node_id], m, trains) for m in grid.seen if m.metadata.message_type == "train"]
    updates = []
    for client, content in enumerate(sent):
        factors, dense, _ = messages.unpack(content.array_records["arrays"])
        adapters = messages.complete(factors, before.adapters) if factors else before.adapters
        updates.append(strategies.Update(client, 10 + client, adapters, dense))
    expected = strategies.make(name).merge(before, updates, 1)
    for layer, pair in strategy.state.adapters.items():
        if strategy.two_phase:  # what it gathers are projections of the same products
            assert pytest.approx(expected.adapters[layer].B @ expected.adapters[layer].A, abs=1e-5) == pair.B @ pair.A
        else:
            assert all(np.array_equal(a, b) for a, b in zip(pair, expected.adapters[layer], strict=True))
    mean_client = sum((10 + c) * c for c in range(CLIENTS)) / sum(10 + c for c in range(CLIENTS))
    if not strategy.personal:
        assert strategy.state.dense["head"] == pytest.approx(np.full(HEAD, mean_client))
    for layer in LAYERS if "R" in strategy.trains else ():
        name_R = messages.rotation(layer)
        assert np.array_equal(strategy.state.dense[name_R], expected.dense[name_R]) and expected.dense[name_R].any()
    assert strategy.report is not None
    mean_loss = sum((10 + c) / (1 + c) for c in range(CLIENTS)) / sum(10 + c for c in range(CLIENTS))
    assert strategy.report.metrics["client_loss"] == pytest.approx(mean_loss)


def test_cohorts_are_drawn_without_replacement_and_differ() -> None:
    drawn = [draw_cohort(0, round, list(range(100)), 10) for round in range(1, 31)]
    assert all(len(set(cohort)) == 10 and cohort == sorted(cohort) for cohort in drawn)
    assert len({tuple(cohort) for cohort in drawn}) == 30
    assert len({client for cohort in drawn for client in cohort}) > 90
    assert draw_cohort(1, 1, list(range(100)), 10) != drawn[0]


# ---- bytes


@every_strategy
def test_bytes_by_hand(name: str) -> None:
    """float32, a header of 128 bytes an array: down all that there is, up what is trained and does not stay."""
    strategy = make(name, fraction_train=0.6)
    play(strategy, StubGrid(honest()), rounds=1)
    sizes = {"A": 4 * RANK * (5 + 5) + 2 * 128, "B": 4 * RANK * (6 + 7) + 2 * 128, "R": 2 * (4 * RANK * RANK + 128), "": 0}
    head = 0 if name == "fedsa_lora" else 4 * HEAD + 128
    up = {"fedask": "", "fed_sb": "R", "fedsa_lora": "A", "fedsvd": "B", "ffa_lora": "B", "rolora": "B"}.get(name, "AB")
    down, up_bytes = sizes["A"] + sizes["B"] + head, sum(sizes[factor] for factor in up) + head
    if name == "fed_sb":
        down += sizes["R"]
    if name == "fedask":  # asks for sketches (m, 5) by their number of columns, then for projections (5, 5) by bases (m, 5)
        down += 8 + 128 + 4 * 5 * (6 + 7) + 2 * 128
        up_bytes += 4 * 5 * (6 + 7) + 2 * 128 + 2 * (4 * 5 * 5 + 128)
    assert strategy.report is not None
    assert strategy.report.bytes_down == 3 * down
    assert strategy.report.bytes_up == 3 * up_bytes


# ---- clients that fail


def raising(number: int, message: Message) -> RecordDict:
    raise RuntimeError("CUDA out of memory")


def changed(change: Callable[[dict[str, np.ndarray]], Any], **keywords: Any) -> Client:
    """A client that changes the arrays it has trained before it sends them."""

    def client(number: int, message: Message) -> RecordDict:
        content = trained(number, message, "AB", **keywords)
        arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
        change(arrays)
        content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return content

    return client


def poisoned(name: str, value: float) -> Client:
    return changed(lambda arrays: arrays[name].__setitem__((0,) * arrays[name].ndim, value))


B = "model.query.lora_B.weight"
FAILURES: dict[str, tuple[Client, str]] = {
    "raises": (raising, "CUDA out of memory"),
    "never replies": (lambda number, message: None, "no reply in time"),
    "NaN": (poisoned(B, np.nan), "model.query.lora_B has NaN or infinite entries"),
    "infinity": (poisoned(B, np.inf), "model.query.lora_B has NaN or infinite entries"),
    "NaN in the head": (poisoned("head", np.nan), "head has NaN or infinite entries"),
    "wrong shape": (changed(lambda a: a.update({B: a[B].T})), "model.query.lora_B has shape (2, 6) instead of (6, 2)"),
    "missing layer": (
        changed(lambda a: [a.pop(name) for name in list(a) if name.startswith("model.query")]),
        "model.query",
    ),
    "unknown layer": (changed(lambda a: a.update({"x.lora_B.weight": np.ones((2, 2))})), "layer x is unknown"),
    "missing factors": (
        changed(
            lambda a: (
                [a.pop(f"model.value.lora_{f}.weight") for f in "AB"] and a.update({"model.value.lora_C.weight": np.ones(1)})
            )
        ),
        "model.value",
    ),
    "no head": (changed(lambda a: a.pop("head")), "head is missing"),
    "wrong head": (changed(lambda a: a.update(head=np.ones(4))), "head has shape (4,) instead of (3,)"),
    "unknown array": (changed(lambda a: a.update(tail=np.ones(4))), "tail is unknown"),
    "nothing": (lambda number, message: RecordDict(), "the reply lacks its arrays or its num-examples"),
    "no examples": (changed(lambda a: None, examples=0), "num-examples is 0"),
    "negative examples": (changed(lambda a: None, examples=-3), "num-examples is -3"),
    "NaN examples": (changed(lambda a: None, examples=float("nan")), "num-examples is nan"),
    "infinite examples": (changed(lambda a: None, examples=float("inf")), "num-examples is inf"),
    "half an example": (changed(lambda a: None, examples=0.5), "num-examples is 0.5"),
    "a list of examples": (changed(lambda a: None, examples=[3, 4]), "num-examples is [3, 4]"),
}


def with_failures(failing: dict[int, Client]) -> Client:
    others = honest()

    def client(number: int, message: Message) -> RecordDict | None:
        if number in failing and message.metadata.message_type == "train":
            return failing[number](number, message)
        return others(number, message)

    return client


@every_strategy
@pytest.mark.parametrize("failure", FAILURES)
def test_a_client_that_fails_is_dropped_and_named(name: str, failure: str) -> None:
    """The round goes on without it, with the same bits as if it had not been there; the report says who and why."""
    if strategies.strategy_class(name).personal and "head" in failure:
        pytest.skip("clients keep their heads")
    client, reason = FAILURES[failure]
    strategy = make(name)
    history = play(strategy, StubGrid(with_failures({2: client}), shuffle=5))
    assert strategy.report is not None and list(strategy.report.drops) == [2]
    assert reason in strategy.report.drops[2] and "\n" not in strategy.report.drops[2]
    assert history == play(make(name), StubGrid(with_failures({2: lambda number, message: None})))


@every_strategy
@pytest.mark.parametrize("round", [1, 2])
def test_one_layer_missing_is_refused(name: str, round: int) -> None:
    """In whatever a client sends of it: factors, R, or the answer to a further message."""

    def client(number: int, message: Message) -> RecordDict | None:
        content = others(number, message)
        job = message.content.config_records.get(messages.CONFIG)
        if number == 1 and content is not None and job and job[messages.ROUND] == round:
            kept = {key: array for key, array in content.array_records["arrays"].items() if "query" not in key}
            content["arrays"] = ArrayRecord(kept)
        return content

    strategy, others = make(name), honest()
    play(strategy, StubGrid(client), rounds=round)
    assert strategy.report is not None and list(strategy.report.drops) == [1]
    said = strategy.report.drops[1]
    assert said.startswith(("layer model.query is missing", "model.query.lora_R.weight is missing", "model.query.sketch in"))


@every_strategy
@pytest.mark.parametrize("round", [1, 2])
def test_a_factor_that_a_client_should_have_trained_is_not_silently_the_old_one(name: str, round: int) -> None:
    for lacking in (sends := make(name).sends(round)):
        rest = "AB".replace(lacking, "")
        strategy = make(name)
        grid = StubGrid(with_failures({1: lambda number, m, rest=rest: trained(number, m, rest)}))  # type: ignore[misc]
        play(strategy, grid, rounds=round)
        assert strategy.report is not None
        assert strategy.report.drops == {1: f"model.query.lora_{lacking} is missing"}
    assert sends or name in ("fed_sb", "fedask")


@pytest.mark.parametrize(
    ("code", "reason", "named"),
    [
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "Traceback\n  line\nValueError: 3\n", "ValueError: 3"),
        (
            ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
            "Traceback\n  line\nfedlora.check.RunError: the sum is over\n",
            "the sum is over",
        ),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ConfigError: data.csv does not exist", "data.csv does not exist"),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "  ", "error"),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "", "error"),
        (ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable — no heartbeat", "its device went away before it answered"),
    ],
)
def test_of_an_error_the_last_line_is_kept(code: int, reason: str, named: str) -> None:
    class Failing(StubGrid):
        def _call(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train" and self.nodes[message.metadata.dst_node_id] == 0:
                message.metadata.__dict__["_message_id"] = "lost"
                reply = Message(Error(code=code, reason=reason), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink answers for a node that was killed
                return reply
            return super()._call(message)

    strategy = make("fedavg")
    play(strategy, Failing(honest("AB")), rounds=1)
    assert strategy.report is not None and strategy.report.drops == {0: named}


@every_strategy
def test_the_server_keeps_the_precision_it_broadcast(name: str) -> None:
    """Client 0 trains in float64: what it sends is rounded, and neither the state nor later messages grow."""

    honestly = honest()

    def client(number: int, message: Message) -> RecordDict | None:
        content = honestly(number, message)
        if number == 0 and message.metadata.message_type == "train" and content is not None:
            wide = {key: Array(array.numpy().astype(np.float64)) for key, array in content.array_records["arrays"].items()}
            content["arrays"] = ArrayRecord(wide)
        return content

    strategy = make(name)
    assert play(strategy, StubGrid(client)) == play(make(name), StubGrid(honest()))


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_number_too_large_for_the_broadcast_is_not_let_in_as_infinity() -> None:
    half = ArrayRecord({key: Array(array.numpy().astype(np.float16)) for key, array in initial().items()})
    strategy = make("fedavg")
    strategy.start(StubGrid(with_failures({4: poisoned(B, 1e6)})), half, 1)
    assert strategy.report is not None and strategy.report.drops == {4: "model.query.lora_B has NaN or infinite entries"}


def test_a_reply_to_another_round_is_not_taken_for_this_one() -> None:
    class Late(StubGrid):
        """Delivers every reply to a training message a second time, in the round after."""

        held: tuple[Message, ...] = ()

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            replies = list(super().send_and_receive(messages, timeout=timeout))
            late, self.held = self.held, tuple(r for r in replies if r.metadata.message_type == "train")
            return [*replies, *late]

    assert play(make("fedavg"), Late(honest("AB"))) == play(make("fedavg"), StubGrid(honest("AB")))


@pytest.mark.parametrize("message_ids", [True, False])
def test_a_reply_from_outside_the_cohort_is_not_taken(message_ids: bool) -> None:
    class Unasked(StubGrid):
        """Delivers what every client would have sent, asked or not."""

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            asked = list(messages)
            replies = list(super().send_and_receive(asked, timeout=timeout))
            others = self.nodes.keys() - {message.metadata.dst_node_id for message in asked}
            extra = [Message(m.content, node, m.metadata.message_type) for m in asked[:1] for node in others]
            return [*replies, *super().send_and_receive(extra)]

    grids = Unasked(honest("AB"), message_ids=message_ids), StubGrid(honest("AB"))
    got, expected = (play(make("fedavg", fraction_train=0.4), grid) for grid in grids)
    assert got == expected


def test_too_few_usable_updates_end_the_run_with_numbers() -> None:
    failing: dict[int, Client] = {0: raising, 1: poisoned(B, np.nan), 3: lambda number, message: None}
    grid = StubGrid(with_failures(failing), shuffle=6)
    with pytest.raises(RunError) as error:
        make("fedavg", min_success=0.5).start(grid, initial(), 2)
    text = str(error.value)
    assert "round 1: 2 of 5 clients returned a usable update, min_success=0.5 asks for 3" in text
    assert "CUDA out of memory" in text and "client 1: model.query.lora_B has NaN" in text and "\n" not in text
    make("fedavg", min_success=0.4).start(grid, initial(), 1)  # 2 of 5 are enough for that


@every_strategy
@pytest.mark.parametrize("failure", ["raises", "never replies", "NaN"])
def test_all_failing_ends_the_run(name: str, failure: str) -> None:
    client = FAILURES[failure][0]
    grid = StubGrid(with_failures(dict.fromkeys(range(CLIENTS), client)))
    with pytest.raises(RunError, match="round 1: 0 of 5 clients"):
        make(name, min_success=1e-12).start(grid, initial(name), 1)


@pytest.mark.parametrize(("share", "failing"), [(0.55, 9), (0.7, 6), (0.28, 18)])
def test_min_success_counts_as_written(share: float, failing: int) -> None:
    """.55 of 20 is 11, though in floating point it is 11.000000000000002."""
    clients = with_failures(dict.fromkeys(range(failing), raising))
    grid = StubGrid(clients, clients=20 if share != 0.28 else 25)
    make("fedavg", min_success=share, min_available_nodes=20).start(grid, initial(), 1)
    grid = StubGrid(with_failures(dict.fromkeys(range(failing + 1), raising)), clients=len(grid.nodes))
    with pytest.raises(RunError):
        make("fedavg", min_success=share, min_available_nodes=20).start(grid, initial(), 1)


def test_nodes_that_do_not_come_online_end_the_run_with_numbers() -> None:
    with pytest.raises(RunError, match="5 of 6 nodes came online in 0 s"):
        make("fedavg", min_available_nodes=6, patience=0.0).start(StubGrid(honest("AB")), initial(), 1)


# ---- the roll call


def silent(sends: str | None = None) -> Client:
    """A ClientApp without a query function, such as somebody else's."""
    others = honest(sends)

    def client(number: int, message: Message) -> RecordDict | None:
        if message.metadata.message_type == "query":
            raise ValueError("No query function registered with name 'default'")
        return others(number, message)

    return client


@every_strategy
def test_clients_that_answer_no_query_are_numbered_by_node(name: str) -> None:
    strategy = make(name, fraction_train=0.6)
    assert play(strategy, StubGrid(silent())) == play(make(name, fraction_train=0.6), StubGrid(honest()))


def test_a_silent_client_that_comes_online_later_takes_part() -> None:
    strategy, grid = make("fedavg", min_available_nodes=3), StubGrid(silent("AB"), clients=3)
    play(strategy, grid, rounds=1)
    grid.join(3)
    strategy.configure_train(2, initial(), ConfigRecord(), grid)
    assert strategy.report is not None and strategy.report.cohort == [0, 1, 2, 3]


def test_a_node_is_asked_once_and_a_new_one_when_it_comes() -> None:
    strategy, grid = make("fedavg"), StubGrid(honest("AB"), shuffle=7)
    play(strategy, grid, rounds=3)
    assert sum(message.metadata.message_type == "query" for message in grid.seen) == CLIENTS
    grid.join(CLIENTS)
    strategy.configure_train(4, initial(), ConfigRecord(), grid)
    assert sum(message.metadata.message_type == "query" for message in grid.seen) == CLIENTS + 1
    assert strategy.report is not None and strategy.report.cohort == list(range(CLIENTS + 1))


def test_an_answer_that_names_no_client_is_none() -> None:
    """Somebody else's ClientApp may well have a query function, which knows nothing of ours."""

    def client(number: int, message: Message) -> RecordDict | None:
        if message.metadata.message_type == "query":
            return RecordDict({"metrics": MetricRecord({"battery": 0.7})})
        return honest("AB")(number, message)

    assert play(make("fedavg"), StubGrid(client)) == play(make("fedavg"), StubGrid(honest("AB")))


def test_where_some_answer_the_silent_ones_stay_out() -> None:
    def client(number: int, message: Message) -> RecordDict | None:
        return (silent if number == 1 else honest)("AB")(number, message)

    strategy = make("fedavg")
    play(strategy, StubGrid(client, shuffle=8))
    assert strategy.report is not None and strategy.report.cohort == [0, 2, 3, 4]


def test_a_number_belongs_to_the_first_node_that_says_it() -> None:
    """Another that says it too is named and never asked to train, in the holder's absence too; the bits are as without it."""
    strategy, grid, said = make("fedavg", min_available_nodes=4), StubGrid(honest("AB")), list[str]()
    strategy.roll.say = said.append
    play(strategy, grid, rounds=1)
    grid.nodes[50] = 2  # it comes later, and first in the order of ids
    why = "it says that it is client 2, which is node 102; give each device a number of its own (--client)"
    for round, cohort in ((2, [0, 1, 2, 3, 4]), (3, [0, 1, 3, 4])):
        asked = strategy.configure_train(round, initial(), ConfigRecord(), grid)
        assert strategy.report is not None and strategy.report.cohort == cohort
        assert [message.metadata.dst_node_id for message in asked] == [100 + client for client in cohort]
        assert strategy.report.as_row(0.0)["refused"] == {50: why}
        grid.nodes.pop(102, None)
    assert said == [f"node 50 takes no part: {why}"]
    strategy.roll.patience = 0.0
    with pytest.raises(RunError, match="4 of 5 nodes came online"):  # what takes no part is not waited for either
        strategy.roll.nodes(grid, 5)
    both = StubGrid(honest("AB"))
    both.nodes[999] = 0
    strategy = make("fedavg")
    assert play(strategy, both) == play(make("fedavg"), StubGrid(honest("AB")))
    assert strategy.report is not None and list(strategy.report.refused) == [999]


def test_a_number_beyond_the_clients_is_refused() -> None:
    strategy, grid = make("fedavg", clients=3, min_available_nodes=3), StubGrid(honest("AB"), clients=4)
    play(strategy, grid, rounds=1)
    assert strategy.report is not None and strategy.report.cohort == [0, 1, 2]
    assert "client 3, and there are clients=3, counted from 0" in strategy.report.refused[103]


def test_a_node_that_has_become_another_client_is_dropped() -> None:
    """A device that was started again with another number trains on what is not that client's."""

    def client(number: int, message: Message) -> RecordDict | None:
        content = honest("AB")(number, message)
        if message.metadata.message_type == "train" and number == 1 and content is not None:
            content["metrics"][messages.CLIENT] = 3
        return content

    strategy = make("fedavg")
    play(strategy, StubGrid(client))
    assert strategy.report is not None
    assert strategy.report.drops == {1: "it says that it is client 3 now; start the run again"}


# ---- evaluation on the clients


def test_clients_are_asked_for_their_own_accuracy() -> None:
    """Accuracies 0, .1, … .4; client 0 holds nothing back, so it does not count: mean of .1 … .4."""
    strategy = make("fedavg", fraction_evaluate=1.0, fraction_train=0.4)
    result = strategy.start(StubGrid(honest("AB"), shuffle=9), initial(), 2)
    spread = result.evaluate_metrics_clientapp[2]
    accuracies = np.array([0.1, 0.2, 0.3, 0.4])
    assert spread["client_accuracy_mean"] == pytest.approx(0.25)
    assert spread["client_accuracy_std"] == pytest.approx(accuracies.std())
    assert spread["client_accuracy_worst_decile"] == pytest.approx(0.13)
    assert spread["clients_evaluated"] == 4
    assert strategy.report is not None and strategy.report.metrics["client_accuracy_mean"] == pytest.approx(0.25)


def test_a_client_that_fails_to_evaluate_does_not_count() -> None:
    def client(number: int, message: Message) -> RecordDict | None:
        if message.metadata.message_type == "evaluate":
            if number == 1:
                raise RuntimeError("no test set")
            if number == 2:  # somebody else's client, which measures something else under another name
                return RecordDict({"results": MetricRecord({messages.EXAMPLES: 7, "f1": 0.5})})
        return honest("AB")(number, message)

    result = make("fedavg", fraction_evaluate=1.0).start(StubGrid(client), initial(), 1)
    assert result.evaluate_metrics_clientapp[1]["clients_evaluated"] == 2
    assert result.evaluate_metrics_clientapp[1]["client_accuracy_mean"] == pytest.approx(0.35)


def test_no_evaluation_unless_it_is_asked_for() -> None:
    grid = StubGrid(honest("AB"))
    result = make("fedavg").start(grid, initial(), 1)
    assert {message.metadata.message_type for message in grid.seen} == {"query", "train"}
    assert not result.evaluate_metrics_clientapp


# ---- in anybody's ServerApp


def test_fedsvd_in_a_serverapp_of_somebody_who_uses_peft() -> None:
    """PEFT's state dict goes in, three rounds run, and PEFT loads what comes out: A orthonormal, other weights untouched."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    strategy = make("fedsvd", scale=2.0)
    app = ServerApp()
    results: list[ArrayRecord] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(peft.get_peft_model_state_dict(model))
        results.append(strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3).arrays)

    app(StubGrid(silent("B"), shuffle=10), Context(1, 1, {}, RecordDict(), {}))
    loaded = peft.set_peft_model_state_dict(model, results[0].to_torch_state_dict())
    assert not loaded.unexpected_keys
    state = peft.get_peft_model_state_dict(model)
    assert state.keys() == results[0].keys() and len(state) == 2 * 2 * 2 + 2
    assert strategy.state is not None and len(strategy.state.adapters) == 4
    for layer, pair in strategy.state.adapters.items():
        A, factor_B = (state[f"{layer}.lora_{f}.weight"].numpy() for f in "AB")
        assert np.array_equal(A, pair.A) and np.array_equal(factor_B, pair.B) and pair.B.any()
        assert np.abs(A @ A.T - np.eye(4)).max() < 1e-6
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert np.array_equal(
        state["base_model.model.classifier.bias"].numpy(), strategy.state.dense["base_model.model.classifier.bias"]
    )
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()

"""A device by itself: its ledger and seed, its limits, what it makes of what it is sent, and how records come home."""

import json
import math
import signal
import subprocess

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.private import Mechanism
from clients.task import Task
from fedlora import data, experiment, messages, plan, workbench
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, DatasetConfig, TrainConfig
from fedlora.deploy import client, launch, preview, server
from fedlora.deploy.account import LEDGER, SECRET, Account, Limits
from fedlora.deploy.courier import Receiver, Sender
from fedlora.deploy.device import Device, Holdings, localised, same_base
from strategies.rollcall import RollCall
from tests.conftest import ROOT, write_digits

LIMITS = Limits(epsilon=8.0, delta=1e-5, clip=1.0, steps=100)
STEPS = (0.9, 0.2, 4)  # σ, q, steps of a round


@pytest.fixture
def account(tmp_path):
    return Account(tmp_path / "state", LIMITS)


def reopened(account: Account, limits: Limits = LIMITS) -> Account:
    account.close()
    return Account(account.folder, limits)


# ---- the ledger and the seed


def test_a_round_is_on_disk_before_it_begins_and_is_found_again(account) -> None:
    assert account.admit({"round": 1}, *STEPS) == 1
    (line,) = (account.folder / LEDGER).read_text().splitlines()
    assert json.loads(line) == {"number": 1, "noise_multiplier": 0.9, "sampling_rate": 0.2, "steps": 4, "round": 1}
    spent = account.spent
    again = reopened(account)
    assert again.spent == spent > 0 and again.admit({"round": 1}, *STEPS) == 2  # the same round again counts again


def test_nothing_is_written_of_a_round_above_the_budget(account) -> None:
    with pytest.raises(RunError, match=r"100 steps with σ = 0.5 would take it above its own budget of 8"):
        account.admit({}, 0.5, 1.0, 100)
    assert account.spent == 0 and not (account.folder / LEDGER).exists()


def test_a_budget_is_for_all_runs_together(account) -> None:
    rounds = 0
    with pytest.raises(RunError, match="budget"):
        while True:
            account = reopened(account)
            account.admit({}, *STEPS)
            rounds += 1
    assert 0 < account.spent <= 8 < account.after(*STEPS) and rounds == len(account.rows)


def test_a_line_that_a_kill_cut_off_is_removed_and_a_damaged_one_refused(account) -> None:
    account.admit({}, *STEPS)
    path = account.folder / LEDGER
    path.write_text(path.read_text() + '{"number": 2, "noise')
    account = reopened(account)
    assert len(account.rows) == 1 and account.admit({}, *STEPS) == 2
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2]
    for damage in ("", '{"number": 1}\n', path.read_text().splitlines()[1] + "\n", "x\n"):
        path.write_text(damage)
        if damage:
            with pytest.raises(ConfigError, match="damaged in line 1"):
                reopened(account)


def test_the_seed_is_made_once_by_the_operating_system_and_for_the_owner_only(account, tmp_path) -> None:
    other = Account(tmp_path / "other", LIMITS)
    assert account.secret != other.secret and len(account.secret) == 64
    assert (account.folder / SECRET).stat().st_mode & 0o777 == 0o600
    assert reopened(account).secret == account.secret
    (other.folder / SECRET).write_text("short")
    with pytest.raises(ConfigError, match="32 bytes"):
        reopened(other)


def test_two_clients_cannot_share_a_ledger(account) -> None:
    with pytest.raises(ConfigError, match="used by another fedlora-client"):
        Account(account.folder, LIMITS)


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


# ---- what is asked of it


@pytest.fixture
def folder(tmp_path):
    write_digits(tmp_path / "data", 2, each=20)
    return tmp_path / "data"


@pytest.fixture
def own(folder):
    holdings = DatasetConfig(name="files", path=str(folder / "device-0.jsonl"), image="image", test_fraction=0.0)
    return preview.data(Holdings(0, 0, holdings, ("vit_digits", None), "cpu", 1.0))


@pytest.fixture
def asked(small, folder):
    """What a server sends; its paths lead nowhere on the device."""

    def make(**overrides) -> Config:
        settings = {
            "clients": 2, "clients_per_round": 2, "deploy": "x", "partition__name": "own", "partition__sizes": [20, 20],
            "dataset__name": "files", "dataset__image": "image", "dataset__classes": [str(k) for k in range(10)],
            "dataset__test": "/nowhere/test.jsonl", "privacy__name": "record", "privacy__noise_multiplier": 1.5,
        }  # fmt: skip
        return small(**settings | overrides)

    return make


def sent(config: Config, kind: str = MessageType.TRAIN) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    here = Config.from_json(config.to_json())
    here.dataset.test = None
    bench, strategy = workbench.build(here), experiment.make_strategy(here)
    state = experiment.initial_state(bench, strategy)
    job = {messages.EXPERIMENT: config.to_json(), messages.ROUND: 1, messages.TRAINS: "B", messages.INIT: "kaiming"}
    job |= {messages.NOISE: [config.privacy.noise_multiplier or 0.0] * 2, messages.CHANGES: False, messages.SENDS: "B"}
    content = RecordDict(
        {messages.ARRAYS: messages.pack(state.adapters, state.dense), messages.CONFIG: ConfigRecord(job)}  # type: ignore[arg-type]
    )
    return Message(content, 1, kind)


def place() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


def test_a_private_round_tells_the_update_and_public_numbers_only(own, asked, account) -> None:
    reply = Device(own, account, lambda line: None)(sent(asked()), place())
    assert set(reply.content[messages.METRICS]) == {messages.CLIENT, messages.EXAMPLES, "seconds", "cohort", "steps"}
    assert {name.rpartition(".lora_")[2] for name in reply.content[messages.ARRAYS]} == {"B.weight"}
    assert len(account.rows) == 1


def test_what_belongs_to_the_device_is_never_the_servers(own, asked) -> None:
    here = localised(own, asked(device="cuda", threads=1, model__path="/etc", dataset__text=None))
    assert (here.device, here.dataset.path, here.dataset.test, here.model.path) == ("cpu", own.data.path, None, None)
    assert here.train == asked().train and here.privacy == asked().privacy


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"privacy__clip": 1.5}, r"clips at 1 or below \(--clip\), the experiment has privacy.clip=1.5"),
        ({"privacy__delta": 1e-4}, r"allows δ = 1e-05 \(--delta\), the experiment has privacy.delta=0.0001"),
        ({"privacy__name": "none", "privacy__noise_multiplier": None}, "trains with privacy=record only"),
        ({"privacy__noise_multiplier": 0.1}, "above its own budget of 8"),
        ({"privacy__noise_multiplier": 0.0}, "above its own budget of 8"),
        ({"train__steps": 101}, r"at most 100 steps a round \(--max-steps\), the experiment asks for 101"),
        ({"dataset__image": None, "dataset__text": "text"}, "holds images, the experiment is about the other"),
        ({"model__name": "hf", "model__path": "x"}, "holds the model vit_digits, the experiment has model=hf"),
    ],
)
def test_an_experiment_beyond_the_owners_limits_is_refused_and_costs_nothing(own, asked, account, settings, reason) -> None:
    message = sent(asked())
    message.content[messages.CONFIG][messages.EXPERIMENT] = asked(**settings).to_json()
    message.content[messages.CONFIG][messages.NOISE] = [settings.get("privacy__noise_multiplier", 1.5) or 0.0] * 2
    with pytest.raises(RunError, match=reason):
        Device(own, account, lambda line: None)(message, place())
    assert account.rows == []


def test_a_base_model_with_other_weights_than_the_servers_is_refused_and_costs_nothing(own, asked, account) -> None:
    """One weight is enough, in its last bit; what was trained before is no part of the base."""
    first, second, device = sent(asked()), sent(asked()), Device(own, account, lambda line: None)
    model = workbench.build(localised(own, asked())).model
    for message in (first, second):
        message.content[messages.CONFIG][messages.BASE] = model.digest
    device(first, place())
    assert len(account.rows) == 1
    weights = dict(model.peft.named_parameters())["base_model.model.vit.layers.0.attention.k_proj.weight"].data
    before = weights[0, 0].item()
    try:
        del model.digest  # it is remembered
        same_base(localised(own, asked()), second.content[messages.CONFIG])
        weights[0, 0] = float(np.nextafter(np.float32(before), np.float32(1)))
        del model.digest
        with pytest.raises(RunError, match=r"this device's weights of vit_digits are others than the server's \(SHA-256 \w+…"):
            device(second, place())
    finally:
        weights[0, 0] = before
        del model.digest
    assert len(account.rows) == 1


def test_an_invalid_experiment_is_refused(own, asked, account) -> None:
    message = sent(asked())
    message.content[messages.CONFIG][messages.EXPERIMENT] = asked().to_json().replace('"batch_size": 16', '"batch_size": -1')
    with pytest.raises(ConfigError, match="batch_size=-1"):
        Device(own, account, lambda line: None)(message, place())


def test_accuracy_on_private_examples_stays(own, asked, account) -> None:
    config = asked(evaluate__holdout=0.2)
    with pytest.raises(RunError, match="keeps the accuracy"):
        Device(own, account, lambda line: None)(sent(config, MessageType.EVALUATE), place())
    open_handed = reopened(account, Limits(math.inf, 1e-5, 1.0, 100))
    reply = Device(own, open_handed, lambda line: None)(sent(config, MessageType.EVALUATE), place())
    assert reply.content[messages.METRICS][messages.EXAMPLES] == 4


def test_only_the_experiment_that_was_agreed_to(own, asked, account) -> None:
    from dataclasses import replace

    device = Device(
        replace(own, agreed=asked(name="other", deploy="elsewhere", partition__sizes=[])), account, lambda line: None
    )
    device(sent(asked()), place())
    with pytest.raises(RunError, match="not the one that this device's owner agreed to"):
        device(sent(asked(train__lr=0.1)), place())


def test_the_roll_call_tells_number_and_examples(own, account) -> None:
    reply = Device(own, account)(Message(RecordDict(), 1, MessageType.QUERY), place())
    assert dict(reply.content[messages.METRICS]) == {messages.CLIENT: 0, messages.EXAMPLES: 20}


# ---- what it says before it connects


def test_the_preview_says_what_leaves_the_device_and_what_it_costs(folder, own, asked, tmp_path, capsys) -> None:
    private = {"privacy__noise_multiplier": None, "privacy__epsilon": 3.0, "rounds": 2}
    simulated = {"deploy": None, "partition__name": "iid", "partition__sizes": [], "dataset__path": "/nowhere/all.jsonl"}
    config = asked(**private | simulated)
    (tmp_path / "config.json").write_text(config.to_json())
    arguments = ["--superlink", "x:1", "--client", "0", "--data", str(folder / "device-0.jsonl"), "--image", "image"]
    arguments += ["--epsilon", "8", "--state", str(tmp_path / "s"), "--device", "cpu", "--check"]
    assert client.main([*arguments, "--experiment", str(tmp_path / "config.json")]) == 0
    said = capsys.readouterr().out
    bench = workbench.build(localised(own, config))
    strategy = experiment.make_strategy(config)
    state = experiment.initial_state(bench, strategy)
    up = plan.bytes_up(state, strategy)
    assert "20 examples" in said and f"{up / 1000:.1f} kB" in said and "8 arrays" in said
    assert "costs: ε = 2.9" in said and "4 steps)" in said
    assert client.main([*arguments, "--epsilon", "0"]) == 2
    assert "--epsilon=0.0 is out of range" in capsys.readouterr().err


# ---- data that are not all in one place


def test_named_classes_let_a_file_lack_some_and_a_server_have_no_training_data(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "no"}\n{"text": "y", "label": "no"}\n')
    file = DatasetConfig(name="files", text="text", test_fraction=0.0, classes=["yes", "no", "maybe"])
    mine = data.load(DatasetConfig(**vars(file) | {"path": str(tmp_path / "a.jsonl")}), 0)
    assert mine.classes == ["maybe", "no", "yes"] and mine.train.labels.tolist() == [1, 1] and len(mine.test) == 0
    server = data.load(DatasetConfig(**vars(file) | {"test": str(tmp_path / "a.jsonl")}), 0)
    assert server.classes == mine.classes and len(server.train) == 0 and len(server.test) == 2
    assert len(data.load(file, 0).test) == 0
    with pytest.raises(ConfigError, match=r"is 'no' in row 1 of .*, none of dataset.classes=yes,maybe"):
        data.load(DatasetConfig(**vars(file) | {"path": str(tmp_path / "a.jsonl"), "classes": ["yes", "maybe"]}), 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["partition=iid"], "partition=iid does not go with deploy"),
        (["dataset.path=x.csv"], "dataset.path=x.csv does not go with deploy"),
        (["dataset.classes=[]"], "dataset.classes=[]; name all labels"),
        (["dataset=digits"], "dataset=digits; set dataset=files"),
        (["min_online=60"], "min_online=60 is more than clients=50"),
    ],
)
def test_settings_that_do_not_go_with_devices_are_refused_in_one_sentence(overrides, sentence, capsys) -> None:
    from fedlora import cli

    usual = ["deploy=here", "dataset=files", "dataset.text=text", "dataset.classes=[a,b]", "model=hf", "model.path=x"]
    assert cli.main(ROOT / "configs", [*usual, *overrides]) == 2
    assert sentence in capsys.readouterr().err


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
    with pytest.raises(RunError, match="client 1 of clients=2 was not online"):
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
    assert estimate.trainings == 4 and estimate.steps == 8 and math.isnan(estimate.seconds)
    strategy = experiment.make_strategy(config)
    state = experiment.initial_state(workbench.build(config), strategy)
    assert estimate.up == 4 * plan.bytes_up(state, strategy)
    assert "20 / 42 / 64" in said and "bytes of the run" in said and "time" not in said and "activations" not in said


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
    (home / "adapter" / "weights").write_bytes(bytes(range(256)) * 500)  # of several pieces
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
    assert files == {"adapter/weights": bytes(range(256)) * 500}
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(RunError, match="outside the results folder"):
            Receiver(said.append, rows.append, files.__setitem__).take(f"fedlora 0 end {name}\n")

"""A federation on devices that is broken off goes on under a new Flower run: server and devices in this process."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.app import Context, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from clients import app
from fedlora import disk
from fedlora.app import experiment, report
from fedlora.app.checkpoint import Checkpoints
from fedlora.app.folder import LOCK
from fedlora.app.records import Recorder
from fedlora.arrays import messages
from fedlora.check import ConfigError, RunError
from fedlora.config import CheckpointConfig, Config, DatasetConfig
from fedlora.deploy import launch, memory, preview, server
from fedlora.deploy.account import Account
from fedlora.deploy.courier import Receiver, Sender
from fedlora.deploy.device import Device, goes_back
from fedlora.deploy.holdings import Holdings, identity
from fedlora.deploy.limits import Limits
from fedlora.deploy.memory import Memory
from fedlora.deploy.sums import SecureSums
from fedlora.engines.local import LocalGrid, carrying
from fedlora.privacy.ledger import Ledger
from fedlora.secure import Identity
from fedlora.server.dp_fedavg import UserLedger
from tests.conftest import write_digits
from tests.test_checkpoint import fails_after, outcome

# ---- what a device keeps


def kept(value: float) -> RecordDict:
    return RecordDict({"personal": messages.record({"x": np.array([value])})})


def value(state: RecordDict) -> float | None:
    return messages.arrays_of(state["personal"])["x"][0] if state else None


def rounds_of(folder) -> list[str]:
    return sorted(path.name[-2:] for path in folder.rglob("round-*"))


def test_a_round_begins_with_the_newest_that_was_kept_before_it(tmp_path) -> None:
    device = Memory(tmp_path)
    assert device.newest("a", 5) == RecordDict()
    for round in (2, 3, 5):
        device.keep("a", round, kept(round), back=0)
    device = Memory(tmp_path)  # it was restarted
    assert [value(device.newest("a", round)) for round in range(7)] == [None, None, 2, 3, 3, 5, 5]
    assert not device.newest("b", 5)
    device.keep("a", 3, kept(3.5), back=0)  # the server has gone back; its round 5 never was
    assert [value(device.newest("a", round)) for round in (2, 3, 9)] == [2, 3.5, 3.5]
    (file,) = (tmp_path / "kept" / "a").glob("round-00003")
    modes = [path.stat().st_mode & 0o777 for path in (file, file.parent, file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_no_more_rounds_are_kept_than_a_device_allows_however_far_a_server_may_go_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "ROUNDS", 3)
    device = Memory(tmp_path)
    for round in range(1, 8):
        device.keep("a", round, kept(round), goes_back(CheckpointConfig(1, 10**9), round))
    assert rounds_of(tmp_path) == ["05", "06", "07"]


@pytest.mark.parametrize(
    ("every", "keep", "back"),
    [
        (1, 2, [0, 0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 2, [0, 0, 0, 0, 0, 0, 3, 3, 3]),
        (3, 1, [0, 0, 0, 3, 3, 3, 6, 6, 6]),
        (0, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_as_much_is_kept_as_the_server_may_go_back_and_no_more(tmp_path, every, keep, back) -> None:
    config, device = CheckpointConfig(every, keep), Memory(tmp_path)
    checkpoints = [0]  # what `Checkpoints` has while a round is under way
    for round, oldest in enumerate(back, start=1):
        assert goes_back(config, round) == oldest
        if every:
            assert oldest == checkpoints[-keep:][0]
        device.keep("a", round, kept(round), oldest)
        assert rounds_of(tmp_path) == [f"{number:02d}" for number in range(max(oldest, 1), round + 1)]
        checkpoints += [round] if Checkpoints(tmp_path, config).due(round, 99) else []


def test_of_a_client_that_is_seldom_drawn_the_one_before_stays(tmp_path) -> None:
    device = Memory(tmp_path)
    for round in (1, 2, 7, 9):
        device.keep("a", round, kept(round), goes_back(CheckpointConfig(1, 2), round))
    assert rounds_of(tmp_path) == ["07", "09"]
    device.keep("a", 8, RecordDict(), 6)  # nothing is left by this one
    assert rounds_of(tmp_path) == ["07"] and value(device.newest("a", 8)) == 7


def test_a_damaged_file_is_named_and_the_one_before_it_taken(tmp_path) -> None:
    said: list[str] = []
    device = Memory(tmp_path, said.append)
    for round in (1, 2):
        device.keep("a", round, kept(round), back=0)
    path = tmp_path / "kept" / "a" / "round-00002"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(content)
        assert value(device.newest("a", 2)) == 1 and not path.exists()
    path.mkdir()
    (path.parent / "round-two").write_bytes(whole)
    assert value(device.newest("a", 2)) == 1 and not path.exists()
    assert len(said) == 4 and all("round-00002 is damaged and is not used" in line for line in said)


def test_experiments_that_trained_longest_ago_are_forgotten(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "EXPERIMENTS", 2)
    device = Memory(tmp_path)
    for number, (name, round) in enumerate([("a", 1), ("b", 1), ("a", 2), ("c", 1)]):
        device.keep(name, round, kept(1), back=0)
        os.utime(tmp_path / "kept" / name, (number, number))  # clocks of files are coarse
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a", "c"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(RunError, match=r"cannot write what this device keeps to .* \(No space left on device\)"):
        Memory(tmp_path).keep("a", 1, kept(1), back=0)


def test_an_experiment_is_the_same_wherever_it_goes_on_and_another_where_it_begins_anew(small) -> None:
    config = small(deploy="here", partition__name="own", dataset__name="files", dataset__text="t", dataset__classes=["a"])

    def name(lineage: str = "x", **changes) -> str:
        asked = dataclasses.replace(config, **changes)
        return identity(asked, lineage)

    moved = name(results="elsewhere", name="other", deploy="there", checkpoint=CheckpointConfig(3, 1))
    assert name() == moved and len({name(), name("y"), name(seed=5), name(rounds=9)}) == 4


# ---- the server and its devices


class Here(LocalGrid):
    """A SuperLink without a network: a run of it, whose node k is device k − 1, each with a context of its own."""

    def __init__(self, devices: list[Device]) -> None:
        super().__init__(len(devices), "clients.app:app", 1, lambda count: None)
        self.devices = devices
        self.contexts = [Context(1, number, {}, RecordDict(), {}) for number in range(len(devices))]

    def execute(self, messages, timeout):
        raise NotImplementedError

    def push_messages(self, messages) -> list[str]:
        sent = list(messages)
        for message in sent:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self._sent}"
            number = message.metadata.dst_node_id - 1
            arrived = carrying(message, recorddict_from_proto(recorddict_to_proto(message.content)))
            self._replies[message.metadata.message_id] = self.devices[number](arrived, self.contexts[number])
        return [message.metadata.message_id for message in sent]


class Federation:
    """Two or three devices and a server, each with a folder. `run` is one Flower run, the processes of which are all new."""

    def __init__(self, folder, config: Config, monkeypatch, epsilon: float) -> None:
        self.folder, self.config, self.epsilon, self.logs, self.injected = folder, config, epsilon, [], {}
        self.keys = {k: generate_private_key(SECP384R1()) for k in range(config.clients)}
        monkeypatch.setenv("FLWR_HOME", str(folder / "server"))
        monkeypatch.setattr(server, "POLL", 0.01)

    def device(self, k: int) -> Device:
        """Its key of each training is the operating system's, or, of client k's training number n, `keys[k, n]`."""
        data = DatasetConfig(name="files", path=f"{self.folder}/../data/device-{k}.jsonl", image="image", test_fraction=0.0)
        own = preview.data(Holdings(k, 0, data, ("vit_digits", None), "cpu", 0.0))
        account = Account(self.folder / f"state-{k}", Limits(self.epsilon, 1e-5, 1.0, 100), self.logs.append)
        if self.injected:
            account._draw = lambda number: (self.injected[k, number], "a draw")
        return Device(own, account, self.logs.append, self.sums(k) if self.config.aggregation == "secure" else None)

    def sums(self, k: int) -> SecureSums:
        """Each device has a key of its own, and the public ones of all."""
        peers = {client: key.public_key() for client, key in self.keys.items()}
        return SecureSums(Identity(k, self.keys[k], peers), self.folder / f"state-{k}")

    def run(self, capsys, **changes):
        """The results folder on the server; `sent` is what came home, each row also as a mark in what was said meanwhile."""
        devices = [self.device(k) for k in range(self.config.clients)]
        config, self.sent = dataclasses.replace(self.config, **changes), SimpleNamespace(rows=[], files={}, said=[])
        capsys.readouterr()
        try:
            server.main(Here(devices), Context(1, 0, {}, RecordDict(), {messages.EXPERIMENT: config.to_json()}))
        finally:
            for device in devices:
                device.account.close()
            sent = self.sent
            receiver = Receiver(
                sent.said.append, lambda row: (sent.rows.append(row), sent.said.append("row")), sent.files.__setitem__
            )
            for line in capsys.readouterr().out.splitlines():
                receiver.take(line)
        return self.results

    @property
    def results(self):
        return self.folder / "server" / "fedlora" / str(self.config.name)

    def account(self, k: int) -> list[dict]:
        return [json.loads(line) for line in (self.folder / f"state-{k}" / "ledger.jsonl").read_text().splitlines()]


@pytest.fixture
def federation(small, tmp_path, monkeypatch):
    write_digits(tmp_path / "data", 4, each=16)
    monkeypatch.setattr("fedlora.app.report.tested", lambda rows: False)  # no pictures

    def make(name: str, epsilon: float = math.inf, **settings) -> Federation:
        usual = {
            "name": "edge", "clients": 2, "clients_per_round": 2, "rounds": 3, "train__steps": 1, "deploy": "here",
            "partition__name": "own", "dataset__name": "files", "dataset__image": "image", "patience": 20.0,
            "dataset__classes": [str(digit) for digit in range(10)],
        }  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        return Federation(folder, small(**usual | settings), monkeypatch, epsilon)

    return make


KEEPING = {
    "personal": {
        "strategy": {"name": "fedsa_lora"}, "evaluate__holdout": 0.2, "evaluate__every": 3, "compression__up": "int8",
    },
    "feedback": {"strategy": {"name": "fedsvd"}, "compression__up": "top_k"},
    "seldom": {"strategy": {"name": "fedavg"}, "compression__up": "int8", "clients_per_round": 1, "rounds": 5},
    "secure": {"strategy": {"name": "ffa_lora"}, "aggregation": "secure", "clients": 3, "clients_per_round": 3},
}  # fmt: skip


@pytest.mark.parametrize("which", KEEPING)
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(federation, monkeypatch, capsys, which) -> None:
    """Device processes and Flower runs are new each time; checkpoints are two rounds apart, so that a round is taken again."""
    settings, last = KEEPING[which] | {"checkpoint__every": 2}, 4 if which == "seldom" else 3
    whole = federation("whole", **settings)
    whole.run(capsys)
    broken = federation("broken", **settings)
    with monkeypatch.context() as patched:
        fails_after(patched, last, "before")  # after the line of that round
        with pytest.raises(SystemExit):
            broken.run(capsys)
    assert len(broken.sent.rows) == 1 + last
    before = {path: path.read_bytes() for path in broken.folder.glob("state-*/kept/*/*")}
    assert bool(before) == (which != "secure")
    broken.run(capsys)
    assert outcome(broken.results) == outcome(whole.results)
    assert json.loads(broken.sent.files["summary.json"])["resumed"] == [2]
    assert [json.loads(row) for row in broken.sent.rows] == [
        json.loads(line) for line in (broken.results / "rounds.jsonl").read_text().splitlines()
    ]
    if which in ("personal", "feedback"):
        assert sum(line.startswith("round 3:") for line in broken.logs) == 2 * 2
        monkeypatch.setattr(Memory, "newest", lambda self, experiment, round: RecordDict())
        forgetful = federation("forgetful", **settings)
        forgetful.run(capsys)
        assert outcome(forgetful.results) != outcome(whole.results)  # what is kept matters


def test_a_run_that_begins_anew_knows_nothing_of_the_one_before(federation, capsys) -> None:
    settings = KEEPING["feedback"] | {"rounds": 2}
    edge = federation("edge", **settings)
    first = outcome(edge.run(capsys))
    assert edge.sent.said.index("row") < [line[:7] for line in edge.sent.said].index("round 2")  # rows come as they are made
    kept = {path.parent.name for path in edge.folder.glob("state-*/kept/*/*")}
    edge.run(capsys)  # finished: its records come home again
    assert "is finished" in edge.sent.said[0] and len(edge.sent.rows) == 3
    assert {"summary.json", "adapter/adapter_model.safetensors"} <= edge.sent.files.keys()
    assert len(edge.logs) == 2 * 2
    assert outcome(edge.run(capsys, overwrite=True)) == first and len(edge.logs) == 2 * 4
    assert len({path.parent.name for path in edge.folder.glob("state-*/kept/*/*")} - kept) == 1


def test_devices_come_to_the_simulators_adapter_bit_for_bit(federation, small, monkeypatch, capsys) -> None:
    """Under DP-SGD, with the keys of the simulation's trainings in the place of those that devices draw."""
    private = {"rounds": 3, "train__steps": 4, "privacy__name": "record", "privacy__epsilon": 6.0}
    edge, task = federation("edge", epsilon=8.0, **private), app._task

    def noted(message, context):
        made = task(message, context)
        _, client, round = made.streams
        edge.injected[client, round] = made.key
        return made

    data = edge.folder.parent / "data"
    both = [
        line for line in (data / "all.jsonl").read_text().splitlines() if json.loads(line)["device"] in ("device-0", "device-1")
    ]
    (data / "both.jsonl").write_text("\n".join(both) + "\n")
    simulation = small(
        name="simulated", clients=2, clients_per_round=2, **private, partition__name="natural", dataset__name="files",
        dataset__path=str(data / "both.jsonl"), dataset__image="image", dataset__group="device",
        dataset__classes=[str(digit) for digit in range(10)], dataset__test_fraction=0.0,
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(app, "_task", noted)
        experiment.run(simulation, time.perf_counter())
    assert edge.injected.keys() == {(client, round) for client in range(2) for round in (1, 2, 3)}
    ours, theirs = edge.run(capsys), Path(simulation.results) / "simulated"
    for file in ("adapter/adapter_model.safetensors", "privacy.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    rows = [[json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()] for folder in (ours, theirs)]
    for key in ("epsilon_max", "update_norm", "bytes_up", "bytes_down", "drops"):
        assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]
    assert "client_loss" in rows[1][1] and not {"client_loss", "client_clipped", "client_noise_product"} & rows[0][1].keys()


def test_noise_is_fresh_in_a_round_that_is_taken_again_and_is_counted_on_both_sides(federation, monkeypatch, capsys) -> None:
    private = {"privacy__name": "record", "privacy__noise_multiplier": 1.5, "checkpoint__every": 2}
    edge = federation("edge", epsilon=50.0, **private)
    with monkeypatch.context() as patched:
        fails_after(patched, 3, "before")
        with pytest.raises(SystemExit):
            edge.run(capsys)
    line = json.loads(edge.sent.rows[3])
    file = edge.results / "privacy.json"
    spent = file.read_bytes()
    file.write_bytes(spent[:-9])
    (edge.results / "summary.json").write_text('{"status": "failed", "reason": "how it ended before"}')
    with pytest.raises(ConfigError):
        edge.run(capsys)
    assert "the privacy ledger is damaged" in json.loads(edge.sent.files["summary.json"])["reason"]
    file.write_bytes(spent)
    edge.run(capsys)
    ledger = Ledger.load(edge.results / "privacy.json")
    for k in range(2):
        assert [row["round"] for row in edge.account(k)] == [1, 2, 3, 3]
        assert list(ledger.history(k).values()) == [4]  # one step a round
    again = [json.loads(row) for row in edge.sent.rows]
    assert again[3]["round"] == 3 and again[3]["update_norm"] != line["update_norm"]  # other noise, and nobody minds
    delta = edge.config.privacy.delta
    assert again[3]["epsilon_max"] == max(ledger.epsilon(k, delta) for k in range(2)) > line["epsilon_max"]
    assert not (edge.results / "checkpoints").exists()


def test_releases_of_whole_clients_are_fresh_counted_again_and_read_by_the_server_alone(
    federation, monkeypatch, capsys
) -> None:
    """Two servers of one experiment, with its one seed, release other noise; so does one that takes a round again."""
    private = {"privacy__name": "user", "privacy__noise_multiplier": 1.0, "privacy__sampling": "none", "checkpoint__every": 2}
    other = federation("other", **private)
    other.run(capsys)
    edge = federation("edge", **private)
    with monkeypatch.context() as patched:
        fails_after(patched, 3, "before")
        with pytest.raises(SystemExit):
            edge.run(capsys)
    line = json.loads(edge.sent.rows[3])
    assert not (edge.results / "checkpoints" / "released.json").exists()
    assert json.loads(edge.sent.rows[1])["update_norm"] != json.loads(other.sent.rows[1])["update_norm"]
    edge.run(capsys)
    again = [json.loads(row) for row in edge.sent.rows]
    assert again[3]["update_norm"] != line["update_norm"]
    assert UserLedger.load(edge.results / "privacy.json").rounds == 4  # three, one of them twice
    assert again[3]["epsilon_max"] > line["epsilon_max"] and again[2]["epsilon_max"] < line["epsilon_max"]
    for folder in (edge.results.parent, edge.results):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in edge.results.rglob("*")} == {0}


def test_a_folder_that_others_could_read_is_closed_to_them(federation, capsys) -> None:
    edge = federation("edge", rounds=1)
    edge.results.mkdir(parents=True)
    edge.results.parent.chmod(0o755)
    edge.run(capsys)
    assert [folder.stat().st_mode & 0o777 for folder in (edge.results.parent, edge.results)] == [0o700, 0o700]
    (edge.results / "rounds.jsonl").write_bytes(b'{"round": 0}\n\xff\xfe{\n')  # of a run that has finished
    edge.run(capsys)
    with pytest.raises(RunError, match="the server sent records that cannot be read"):
        launch._object(edge.sent.rows[1])


def test_another_experiment_of_the_name_and_another_run_at_work_are_refused(federation, monkeypatch, capsys) -> None:
    edge = federation("edge", rounds=1)
    edge.run(capsys)
    written = sorted(edge.results.rglob("*"))
    with pytest.raises(ConfigError):
        edge.run(capsys, seed=5)
    summary = json.loads(edge.sent.files.pop("summary.json"))
    assert summary["status"] == "failed" and "it has seed=0, and you ask for seed=5;" in summary["reason"]
    assert not edge.sent.files and not edge.sent.rows and sorted(edge.results.rglob("*")) == written
    monkeypatch.setattr(server, "STOPPING", 0.02)
    with disk.lock(edge.results / LOCK), pytest.raises(ConfigError):
        edge.run(capsys)
    assert "name=edge: another process runs in" in json.loads(edge.sent.files["summary.json"])["reason"]
    edge.run(capsys)


# ---- the command line's side


def test_the_same_command_follows_the_run_that_still_goes_on(small, tmp_path, monkeypatch, capsys) -> None:
    """Its earlier process was killed: nothing is started a second time, and the records are whole."""
    config = small(name="edge", deploy="here", partition__name="own", dataset__name="files", dataset__text="t",
        dataset__classes=["a", "b"])  # fmt: skip
    recorder = Recorder(config, launched=True)
    with recorder.claim():
        recorder.begin()
        recorder.round({"round": 0})
    (recorder.folder / launch.RUN).write_text("7")
    started: list[str] = []
    statuses, logs = {"7": ["running", "finished:completed"], "8": ["finished:completed"]}, {}
    monkeypatch.setattr(launch, "start", lambda *_: started.append("8") or "8")
    about = lambda _, connection, option, number: {"status": statuses[number].pop(0), "status-details": ""}  # noqa: E731
    monkeypatch.setattr(launch, "_answer", lambda *arguments: {"runs": [about(*arguments)]})
    monkeypatch.setattr(launch, "_log", lambda number, connection: (line for line in logs[number]))
    (tmp_path / "rounds.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    logs |= {"7": [], "8": []}
    for number in logs:
        sender = Sender(tmp_path, logs[number].append)
        sender.rounds()
    whole = report.summarise(config, []) | {"status": "finished", "seconds": 1.0, "seconds_to_first_round": 0.5}
    sender.file("summary.json", json.dumps(whole).encode())
    assert launch.run(config, tmp_path)["status"] == "finished"
    assert started == ["8"]  # the one that went on ended without a summary: its ServerApp was killed
    said = capsys.readouterr().out
    assert "run 7 on the SuperLink of here still goes on" in said
    assert (recorder.folder / "rounds.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
    assert not (recorder.folder / launch.RUN).exists()
    (recorder.folder / "summary.json").unlink()
    (recorder.folder / launch.RUN).write_text("9")
    statuses["9"], logs["9"] = ["running", "finished:completed"], logs["8"]
    assert launch.run(config, tmp_path)["status"] == "finished" and started == ["8"]
    (recorder.folder / "summary.json").unlink()
    (recorder.folder / launch.RUN).write_text("9")
    statuses["9"], statuses["8"] = ["finished:stopped"], ["finished:completed"]
    launch.run(config, tmp_path)
    assert started == ["8", "8"]
    statuses["8"] = ["finished:completed"]
    (recorder.folder / launch.RUN).write_text("9")  # that is not asked about, since all is to begin anew
    launch.run(dataclasses.replace(config, overwrite=True), tmp_path)
    assert started == ["8", "8", "8"]

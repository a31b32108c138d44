"""A run that is broken off, anywhere, goes on to the bits of one that never was, and its ledger never forgets."""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import strategies
from fedlora import disk
from fedlora.app import experiment, records
from fedlora.app.checkpoint import Checkpoint, Checkpoints, Released, history
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState
from fedlora.check import ConfigError, RunError
from fedlora.engines.local import LocalGrid
from fedlora.privacy.ledger import Ledger
from fedlora.server.dp_fedavg import UserLedger
from fedlora.tools import cli
from tests.conftest import ROOT

FRESH = ("seconds", "started", "client_seconds")  # of a line, and what begins so: a continued run measures its own


def lines(folder: Path) -> list[dict]:
    """The lines of rounds.jsonl without what is measured by a clock."""
    return [without_clocks(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_clocks(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(FRESH)}


def outcome(folder: Path) -> tuple:
    ledger = folder / "privacy.json"
    return (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        lines(folder),
        ledger.read_bytes() if ledger.exists() else None,
    )


def fails_after(monkeypatch, round: int, when: str = "save") -> None:
    """The process loses its life right after, or right before, the checkpoint of a round."""
    save = Checkpoints.save

    def killed(self, checkpoint) -> None:
        if when == "save" or checkpoint.round != round:
            save(self, checkpoint)
        if checkpoint.round == round:
            raise SystemExit(9)

    monkeypatch.setattr(Checkpoints, "save", killed)


def broken_off(config, monkeypatch, round: int, when: str = "save", app: str = "clients.app:app") -> Path:
    with monkeypatch.context() as patched:
        fails_after(patched, round, when)
        with pytest.raises(SystemExit):
            experiment.run(config, 0.0, app)
    return records.Recorder(config).folder


# ---- the file


@pytest.fixture
def checkpoint() -> Checkpoint:
    rng = np.random.default_rng(0)
    pair = Pair(rng.standard_normal((2, 5)).astype(np.float32), rng.standard_normal((4, 2)).astype(np.float32))
    state = ServerState(
        {"a.b": pair, "c": pair},
        {"head.weight": pair.A, "c.lora_R.weight": np.eye(2, dtype=np.float32)},
        {"c": Pair(np.asfortranarray(rng.standard_normal((3, 5))), np.zeros((4, 3)))},
        scale=0.3,
        extra={"optimizer/c/A/t": np.zeros(()) + 3, "optimizer/c/A/m": rng.standard_normal((2, 5)), "none": np.zeros((0, 2))},
    )
    kept = RecordDict(
        {
            "personal": messages.record({"c.lora_B.weight": pair.B}),
            "counts": MetricRecord({"steps": 3, "loss": 0.1}),
            "job": ConfigRecord({"name": "x", "raw": b"\x00\xff", "rates": [0.1, 0.2], "on": True}),
            "codes": ArrayRecord([np.arange(5, dtype=np.uint8)]),
        }
    )
    digest = "3b5d5c3712955042212316173ccf37be800f7ba5b7c2ba4ec1e4d7a4b9d5a3b1"
    return Checkpoint(7, {"rounds": 9}, state, {3: kept, 11: RecordDict()}, {"stopped": [1]}, (12, digest), [2, 5])


def test_a_checkpoint_comes_back_to_the_bit(checkpoint, tmp_path) -> None:
    path = tmp_path / "round"
    path.write_bytes(checkpoint.to_bytes())
    again = Checkpoint.load(path)
    for name in ("round", "settings", "guard", "history", "resumed"):
        assert getattr(again, name) == getattr(checkpoint, name)
    assert again.clients == checkpoint.clients and set(again.clients) == {3, 11}
    assert again.clients[3]["job"]["raw"] == b"\x00\xff"
    old, new = checkpoint.state, again.state
    assert new.scale == old.scale and new.adapters.keys() == old.adapters.keys()
    for mine, theirs in zip(_arrays(old), _arrays(new), strict=True):
        assert mine[0] == theirs[0] and mine[1].dtype == theirs[1].dtype and mine[1].shape == theirs[1].shape
        assert np.array_equal(mine[1], theirs[1])


def _arrays(state: ServerState) -> list[tuple[str, np.ndarray]]:
    named = messages.named(state.adapters, state.dense, "AB", state.base_correction)
    return sorted((named | {f"extra {name}": array for name, array in state.extra.items()}).items())


def test_any_byte_that_is_missing_or_another_is_noticed(checkpoint, tmp_path) -> None:
    whole, path, rng = checkpoint.to_bytes(), tmp_path / "round", random.Random(0)
    places = [0, 7, 8, len(whole) - 1, *rng.sample(range(len(whole)), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        for content in (bytes(damaged), whole[:place]):
            path.write_bytes(content)
            with contextlib.suppress(ValueError):
                loaded = Checkpoint.load(path)
                # Padding after the header may be a space or not; what comes out is the same then.
                assert loaded.to_bytes() == whole, place


def test_the_newest_whole_one_is_taken_and_the_others_are_named_and_removed(checkpoint, tmp_path) -> None:
    rounds, said = tmp_path / "rounds.jsonl", []
    rounds.write_text("0\n1\n2\n3\n")
    checkpoints = Checkpoints(tmp_path / "checkpoints", _keeping(3))
    assert checkpoints.newest(rounds, said.append) is None
    for round in range(5):
        known = history(rounds, 2 * round)
        own = {3: RecordDict({"counts": MetricRecord({"round": round})})}
        checkpoints.save(dataclasses.replace(checkpoint, round=round, clients=own, history=known, resumed=[]))
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == [f"round-0000{round}.safetensors" for round in (2, 3, 4)]
    rounds.write_text("0\n1\n2\n4\n")  # a line that the newest one knows otherwise
    middle = checkpoints.folder / names[1]
    middle.write_bytes(middle.read_bytes()[:-1])
    found = checkpoints.newest(rounds, said.append)
    assert found is not None and found.round == 2 and checkpoints.resumed == [2]
    assert len(said) == 2 and names[2] in said[0] and "rounds.jsonl" in said[0] and names[1] in said[1]
    assert [path.name for path in checkpoints.folder.iterdir()] == names[:1]


def test_a_clients_state_is_written_when_it_changes_and_its_file_stays_as_long_as_it_is_needed(checkpoint, tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", _keeping(1))
    rounds, nothing = tmp_path / "rounds.jsonl", history(tmp_path / "rounds.jsonl")

    def state(number: int) -> RecordDict:
        return RecordDict({"counts": MetricRecord({"number": number})})

    def saved(round: int, clients: dict[int, RecordDict]) -> dict[int, set[int]]:
        """Round of each file that is there then → the clients whose states are in it."""
        checkpoints.save(dataclasses.replace(checkpoint, round=round, clients=clients, history=nothing))
        there = [Checkpoint.load(path) for path in sorted(checkpoints.folder.iterdir())]
        return {each.round: set(each.clients) for each in there}

    first, second = state(1), state(2)
    assert saved(0, {}) == {0: set()}
    assert saved(1, {1: first, 2: second}) == {1: {1, 2}}
    first["counts"]["number"] = 7  # changed in place, by a client whose app does so; its reply brings another object
    assert saved(2, {1: RecordDict(dict(first)), 2: state(2)}) == {1: {1, 2}, 2: {1}}
    assert saved(3, {1: first, 2: second, 3: state(3)}) == {1: {1, 2}, 2: {1}, 3: {3}}
    checkpoints = Checkpoints(checkpoints.folder, _keeping(1))
    assert checkpoints.newest(rounds, print).clients == {1: state(7), 2: state(2), 3: state(3)}
    assert saved(4, {1: state(7), 2: state(5), 3: state(3)}) == {2: {1}, 3: {3}, 4: {2}}
    assert saved(5, {1: state(7), 3: state(3)}) == {2: {1}, 3: {3}, 5: set()}
    (checkpoints.folder / "round-00003.safetensors").write_bytes(b"torn")
    said: list[str] = []
    checkpoints = Checkpoints(checkpoints.folder, _keeping(1))
    assert checkpoints.newest(rounds, said.append) is None and len(said) == 3  # 5 needs what is torn, and 2 what is gone
    nothing = (1, "of another file")
    assert saved(0, {1: first}) == {0: {1}}
    assert checkpoints.newest(rounds, said.append) is None and saved(0, {1: first}) == {0: {1}}  # not left where it is no more


def _keeping(keep: int):
    return experiment.Config().checkpoint.__class__(every=1, keep=keep)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch) -> None:
    path, steps = tmp_path / "file", []
    disk.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor, fsync=os.fsync: steps.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new, replace=os.replace: steps.append("replace") or replace(old, new))
    disk.write(path, b"new")
    assert steps == ["fsync", "replace", "fsync"] and path.read_bytes() == b"new"  # the file, and after the move the folder

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        disk.write(path, b"newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# ---- the same bits

EVERY = {name: {"strategy": {"name": name}, "evaluate__holdout": 0.2} for name in strategies.names()}
MORE = {
    "adam": {"strategy": {"name": "fedavg"}, "server__optimizer": "adam", "server__lr": 0.1},
    "feedback": {"strategy": {"name": "fedsvd"}, "compression__up": "int8"},
    "head": {"strategy": {"name": "fedsvd"}, "adapter__train_head": True, "adapter__dropout": 0.1},
    "secure": {"strategy": {"name": "ffa_lora"}, "aggregation": "secure", "clients_per_round": 3},
    "record": {"strategy": {"name": "fedsvd"}, "privacy__name": "record", "privacy__epsilon": 6.0},
    "stops": {
        "strategy": {"name": "fedsvd"}, "privacy__name": "record", "privacy__epsilon": 0.35, "privacy__noise_multiplier": 1.5,
        "clients_per_round": 4,
    },
    "user": {"strategy": {"name": "fedsvd"}, "privacy__name": "user", "privacy__noise_multiplier": 1.0},
}  # fmt: skip


@pytest.fixture
def quick(small, monkeypatch):
    """The smallest experiments, without pictures."""
    monkeypatch.setattr(experiment.report, "tested", lambda rows: False)

    def make(**settings):
        usual = {"rounds": 3, "clients": 4, "clients_per_round": 2, "train__steps": 1, "evaluate__every": 3}
        return small(**usual | settings)

    return make


@pytest.mark.parametrize("which", [*EVERY, *MORE])
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(quick, monkeypatch, which) -> None:
    settings = (EVERY | MORE)[which]
    whole = experiment.run(quick(name="whole", **settings), 0.0)
    config = quick(name="broken", **settings)
    folder = broken_off(config, monkeypatch, 1)
    summary = experiment.run(config, 0.0)
    assert outcome(folder) == outcome(folder.with_name("whole"))
    assert (whole.pop("resumed"), summary.pop("resumed")) == ([], [1])
    assert without_clocks(whole) == without_clocks(summary)
    assert not (folder / "checkpoints").exists()
    if which == "stops":
        assert [line["clients_stopped"] for line in lines(folder)] == [0, 1, 3, 3]


def test_rounds_since_the_checkpoint_are_taken_again_and_spent_once(quick, monkeypatch) -> None:
    settings = {"rounds": 5, "checkpoint__every": 2, "privacy__name": "record", "privacy__noise_multiplier": 1.0}
    experiment.run(quick(name="whole", **settings), 0.0)
    config = quick(name="broken", **settings)
    folder = broken_off(config, monkeypatch, 2)
    with monkeypatch.context() as patched:
        line = records.Recorder.round
        patched.setattr(records.Recorder, "round", lambda self, row: line(self, row) or (row["round"] == 3 and _stop()))
        with pytest.raises(SystemExit):
            experiment.run(config, 0.0)
    assert len(lines(folder)) == 4
    broken_off(config, monkeypatch, 4, "before")
    assert len(lines(folder)) == 5
    spent, written, write = Ledger.load(folder / "privacy.json"), [], disk.write

    def watched(path, content) -> None:
        write(path, content)
        if path.name == "privacy.json":
            written.append(Ledger.load(path))

    monkeypatch.setattr(disk, "write", watched)
    summary = experiment.run(config, 0.0)
    assert summary["resumed"] == [2] and outcome(folder) == outcome(folder.with_name("whole"))
    assert len(written) == 3 and all(ledger.at_least(spent) == ledger for ledger in written)
    assert written[0] == written[1] == spent != written[2]


def _stop() -> None:
    raise SystemExit(9)


# ---- what is refused, and what is not taken up


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(quick, monkeypatch) -> None:
    folder = broken_off(quick(name="mine"), monkeypatch, 1)
    (folder / "config.json").unlink()  # the checkpoint knows its settings by itself
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"it has seed=0, train.lr=0.5, and you ask for seed=5, train.lr=0.1;"):
        experiment.run(quick(name="mine", seed=5, train__lr=0.1), 0.0)
    assert sorted(folder.rglob("*")) == before
    summary = experiment.run(quick(name="mine", engine__retries=5, checkpoint__every=3, checkpoint__keep=1), 0.0)
    assert summary["resumed"] == [1]  # what changes no number may change


def test_overwriting_begins_anew_and_so_does_a_run_without_checkpoints(quick, monkeypatch, capsys) -> None:
    private = {"privacy__name": "record", "privacy__noise_multiplier": 1.0}
    folder = broken_off(quick(name="mine", **private), monkeypatch, 2)
    spent = Ledger.load(folder / "privacy.json")
    assert experiment.run(quick(name="mine", overwrite=True, **private), 0.0)["resumed"] == []
    whole = outcome(folder)
    monkeypatch.setattr(Checkpoints, "save", None)
    none = quick(name="none", checkpoint__every=0, **private)
    with monkeypatch.context() as patched:
        patched.setattr(
            Released, "note", lambda self, round, state, note=Released.note: note(self, round, state) or _at(round, 2)
        )
        with pytest.raises(SystemExit):
            experiment.run(none, 0.0)
    assert Ledger.load(folder.with_name("none") / "privacy.json") == spent
    capsys.readouterr()
    assert experiment.run(none, 0.0)["resumed"] == []
    assert outcome(folder.with_name("none")) == whole and "broken off" not in capsys.readouterr().out


def _at(round: int, last: int) -> None:
    if round == last:
        raise SystemExit(9)


def test_a_private_round_that_comes_out_otherwise_the_second_time_ends_the_run(quick, monkeypatch) -> None:
    """Its noise is the same, so the difference of what is released would be without any."""
    user = {"privacy__name": "user", "privacy__noise_multiplier": 1.0, "privacy__sampling": "fixed"}
    config = quick(name="mine", min_success=0.5, checkpoint__every=2, **user)
    folder = broken_off(config, monkeypatch, 2)
    (folder / "checkpoints" / "round-00002.safetensors").write_bytes(b"torn")
    monkeypatch.setattr("tests.apps.FAULTY", set(lines(folder)[1]["cohort"][:1]))  # one of the two of round 1
    with pytest.raises(RunError, match=r"round 1 came out otherwise than before .* its noise twice"):
        experiment.run(config, 0.0, "tests.apps:raises")
    assert UserLedger.load(folder / "privacy.json").rounds == 2
    (folder / "checkpoints" / "released.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*released.json .* restore the file"):
        experiment.run(config, 0.0)


@pytest.mark.parametrize("level", ["user", "record"])
def test_a_private_round_that_comes_out_otherwise_is_sent_to_nobody(quick, monkeypatch, level) -> None:
    """Not even to be tested: the messages of the round that comes before are all that leaves."""
    private = {"privacy__name": level, "privacy__noise_multiplier": 1.0, "privacy__sampling": "fixed"}
    config = quick(name="mine", evaluate__holdout=0.25, evaluate__every=1, **private)
    folder, sent = broken_off(config, monkeypatch, 2, "before"), []
    monkeypatch.setattr("tests.apps.FAULTY", set(lines(folder)[2]["cohort"][:1]))
    send = LocalGrid.send_and_receive

    def watched(self, messages, **keywords):
        messages = list(messages)
        sent.extend(message.metadata.message_type for message in messages)
        return send(self, messages, **keywords)

    monkeypatch.setattr(LocalGrid, "send_and_receive", watched)
    with pytest.raises(RunError, match="round 2 came out otherwise than before"):
        experiment.run(config, 0.0, "tests.apps:raises")
    assert sent.count("train") == 2 and "evaluate" not in sent


@pytest.mark.parametrize("asked", ["1", "auto"])
@pytest.mark.parametrize("which", ["plain", "user", "record", "alternating"])
def test_clients_share_a_pass_as_when_the_run_began(quick, monkeypatch, capsys, which, asked) -> None:
    """Another engine.cohort, or another machine and its cache, where a round that was released is taken again."""
    private = {"privacy__name": which, "privacy__noise_multiplier": 1.0}
    settings = {"plain": {}, "alternating": {"strategy": {"name": "rolora"}}}.get(which, private) | {
        "clients_per_round": 4,
        "train__steps": 2,
        "privacy__sampling": "fixed",
    }
    experiment.run(quick(name="whole", engine__cohort="4", **settings), 0.0)
    folder = broken_off(quick(name="broken", engine__cohort="4", **settings), monkeypatch, 2, "before")
    monkeypatch.setattr("clients.cost.measure", lambda *_: 1)  # what this machine would choose
    capsys.readouterr()
    experiment.run(quick(name="broken", engine__cohort=asked, **settings), 0.0)
    assert outcome(folder) == outcome(folder.with_name("whole"))
    said = "engine.cohort=1: 4 clients share a pass, as when this run began" in capsys.readouterr().out
    assert said == (asked == "1")


def test_flowers_runtime_goes_on_too_but_not_where_clients_keep_something(quick, monkeypatch, capsys) -> None:
    """It has the clients' states to itself."""
    folder = broken_off(quick(name="inline"), monkeypatch, 2)
    experiment.run(quick(name="whole"), 0.0)
    experiment.run(quick(name="inline", engine__name="flower", engine__workers=1), 0.0)
    assert outcome(folder) == outcome(folder.with_name("whole"))
    config = quick(name="kept", compression__up="int8")
    checkpoints = Checkpoints(broken_off(config, monkeypatch, 2) / "checkpoints", config.checkpoint)
    last = checkpoints.newest(folder.with_name("kept") / "rounds.jsonl", print)
    strategy, recorder = experiment.make_strategy(config), records.Recorder(config)
    bench, shown = experiment.workbench.build(config), experiment.terminal.Rounds(config)
    course = experiment.Course(bench, strategy, None, recorder, checkpoints, shown, last.state, 0.0)
    capsys.readouterr()
    course._meet(object())
    assert course.clients is None and "no checkpoints are written" in capsys.readouterr().out
    course.go_on(last)
    with pytest.raises(RunError, match=r"cannot give back what .*compression.up=int8.* go on with engine=inline"):
        course._meet(object())
    monkeypatch.setattr(bench.config, "deploy", "here")  # devices have it on their own disks
    course._meet(object())
    assert course.clients == last.clients


def test_a_full_disk_at_a_checkpoint_ends_the_run_in_one_sentence(quick, monkeypatch) -> None:
    write = disk.write

    def full(path, content) -> None:
        if path.name.startswith("round-"):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*round-00000.safetensors \(No space left on device\)"):
        experiment.run(quick(), 0.0)


# ---- killed for real

SHORT = ["clients=4", "clients_per_round=2", "train.steps=1", "rounds=40", "evaluate.every=40", "device=cpu",
         "privacy=record", "privacy.noise_multiplier=1", "checkpoint.every=2", "engine.cohort=1"]  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Starts `run.py` with these arguments in a process of its own: its id, and a function that waits for its status."""
    log = tmp_path_factory.mktemp("forks")
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | alone | {"TRAINED": str(log / "trained"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.forks"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert server.stdin is not None and server.stdout is not None

    def answer(kind: str) -> int:
        word, number = server.stdout.readline().split()
        assert word == kind  # what is taken for a process is killed
        return int(number)

    def start(*arguments: str):
        server.stdin.write(json.dumps([arguments, str(log / "said")]) + "\n")
        server.stdin.flush()
        return answer("process"), lambda: answer("status")

    start.log = log
    yield start
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory) -> Path:
    """The results of the short run, which nobody stops."""
    results = tmp_path_factory.mktemp("whole")
    _, status = forks(*SHORT, "engine=inline", f"results={results}", "name=whole")
    assert status() == 0, (forks.log / "said").read_text()
    return results / "whole"


def rounds_in(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "rounds.jsonl").read_bytes().count(b"\n")
    return 0


def test_killed_at_ten_random_moments_the_run_has_the_same_bits_and_forgets_nothing(forks, undisturbed, tmp_path) -> None:
    rng, folder, trained = random.Random(12), tmp_path / "killed", forks.log / "trained"
    trained.unlink()
    counted = Ledger()

    def look() -> None:
        """The ledger is there as soon as anybody has trained, has all that was trained, and never shrinks."""
        nonlocal counted
        begun = {tuple(map(int, line.split())) for line in trained.read_text().splitlines()} if trained.exists() else set()
        if not begun and not (folder / "privacy.json").exists():
            return
        ledger = Ledger.load(folder / "privacy.json")
        assert ledger.at_least(counted) == ledger
        for client in {client for client, _ in begun}:
            assert sum(ledger.history(client).values()) >= sum(who == client for who, _ in begun)  # one step a round
        counted = ledger

    for moment in range(10):
        process, status = forks(*SHORT, "engine=inline", f"results={tmp_path}", "name=killed")
        goal = rounds_in(folder) + rng.choice([-99, 1, 2, 3])  # in the start of the process, or some rounds on
        deadline = time.monotonic() + 60
        while rounds_in(folder) < goal and time.monotonic() < deadline:
            look()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.6 if goal < 0 else 0.05))
        os.kill(process, signal.SIGKILL)
        assert status() == signal.SIGKILL, f"moment {moment}: {(forks.log / 'said').read_text()}"
        look()
    _, status = forks(*SHORT, "engine=inline", f"results={tmp_path}", "name=killed")
    assert status() == 0, (forks.log / "said").read_text()
    look()
    assert outcome(folder) == outcome(undisturbed)
    resumed = json.loads((folder / "summary.json").read_text())["resumed"]
    assert resumed and resumed == sorted(set(resumed)) and all(round % 2 == 0 for round in resumed)


def test_a_sweep_that_was_killed_runs_what_it_had_not_finished_and_has_the_table_of_one_that_never_was(forks, tmp_path) -> None:
    def sweep(name: str):
        (forks.log / "said").unlink(missing_ok=True)
        few = ["rounds=8", "evaluate.every=8", "privacy=none", "privacy.noise_multiplier=null"]
        return forks("-m", *SHORT, *few, "engine=inline", "seed=1,2,3", f"results={tmp_path}", f"name={name}")

    assert sweep("whole")[1]() == 0, (forks.log / "said").read_text()
    process, status = sweep("killed")
    whole = {json.loads(file.read_text())["seed"]: file.parent.name for file in tmp_path.glob("whole/*/config.json")}
    first, second, third = (tmp_path / "killed" / whole[seed] for seed in (1, 2, 3))
    deadline = time.monotonic() + 60
    while rounds_in(second) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert status() == signal.SIGKILL and not (second / "summary.json").exists() and not third.exists()
    before = {path: path.stat() for path in first.rglob("*")}
    assert sweep("killed")[1]() == 0, (forks.log / "said").read_text()
    said = (forks.log / "said").read_text()
    assert f"{first} is finished, with these settings" in said and said.count("is finished") == 1
    assert f"{second} was broken off; it goes on after round " in said and said.count("was broken off") == 1
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == {p: s.st_mtime_ns for p, s in before.items()}
    for folder in (first, second, third):
        assert outcome(folder) == outcome(tmp_path / "whole" / folder.name)
    assert table(tmp_path / "killed") == table(tmp_path / "whole") and len(table(tmp_path / "whole")) == 1


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table but their seconds."""
    with open(folder / "table.csv", newline="") as file:
        return [{key: cell for key, cell in row.items() if "seconds" not in key} for row in csv.DictReader(file)]


def test_a_folder_in_which_a_process_runs_is_refused_until_it_ends_however_that_is(
    forks, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(records, "PATIENCE", 0.0)
    own = [*SHORT, "engine=inline", f"results={tmp_path}", "name=mine", "privacy=none", "privacy.noise_multiplier=null"]
    process, status = forks(*own, "rounds=5000")
    deadline = time.monotonic() + 60
    while not rounds_in(tmp_path / "mine") and time.monotonic() < deadline:
        time.sleep(0.01)
    sentence = (
        f"error: name=mine: another process runs in {tmp_path / 'mine'}; wait for its end, stop it, or choose another name\n"
    )
    for more in ([], ["overwrite=true"]):
        assert cli.main(ROOT / "configs", [*own, "rounds=5000", *more]) == 2
        assert capsys.readouterr().err == sentence
    assert cli.main(ROOT / "configs", [*own, "rounds=5000", "plan=true"]) == 0
    os.kill(process, signal.SIGKILL)
    assert status() == signal.SIGKILL
    assert cli.main(ROOT / "configs", [*own, "rounds=1", "overwrite=true"]) == 0


def test_a_run_goes_on_unwatched_where_the_file_system_has_no_locks_and_sees_what_was_finished_meanwhile(
    quick, monkeypatch
) -> None:
    config = quick(name="mine")
    waits = records.Recorder(config)  # before the other one has begun
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "Function not implemented")))
        assert experiment.run(config, 0.0)["status"] == "finished"
    with waits.claim():
        assert waits.finished
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        other = records.Recorder.__new__(records.Recorder)
        other.config, other.folder = quick(name="mine", seed=5), waits.folder
        other.claim()


def test_no_process_outlives_a_run_on_ray_workers_however_it_ends(undisturbed, tmp_path) -> None:
    """Killed, stopped by Ctrl-C, and done: all three the same run, and then one that fails."""
    folder, seen = tmp_path / "ray", set()
    ray = ["engine=ray", "engine.workers=1", f"results={tmp_path}"]
    assert _ended(seen, folder, [*SHORT, *ray, "name=ray"], signal.SIGKILL) == -signal.SIGKILL
    assert _ended(seen, folder, [*SHORT, *ray, "name=ray"], signal.SIGINT) == 130
    assert _ended(seen, folder, [*SHORT, *ray, "name=ray"]) == 0
    assert outcome(folder) == outcome(undisturbed)
    assert len(json.loads((folder / "summary.json").read_text())["resumed"]) == 2
    assert _ended(seen, folder, [*SHORT[:2], *ray, "name=fails", "rounds=2", "train.steps=3", "train.lr=1e30"]) == 1
    assert len(seen) > 4 * 3, "no Ray"
    assert psutil.wait_procs(seen, timeout=60)[1] == []


# Workers from the first round on: the driver would play the clients of so short a run before any of them is up.
RUN = """import sys; from pathlib import Path; from fedlora.tools import cli; from fedlora.engines import ray
ray.RayGrid._up = lambda self: True
sys.exit(cli.main(Path("configs")))"""


def _ended(seen: set[psutil.Process], folder: Path, arguments: list[str], number: int | None = None) -> int:
    """The status of the command, which is sent the signal some rounds on; all processes that it has are added to `seen`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
    goal = rounds_in(folder) + 5
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen.update(psutil.Process(process.pid).children(recursive=True))
        if number is not None and rounds_in(folder) >= goal:
            process.send_signal(number)
            number = process.wait(60) and None
        time.sleep(0.02)
    return process.returncode

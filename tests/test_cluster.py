"""A Ray cluster of several nodes: where a client runs, and which node dies under it, changes no number."""

import dataclasses
import re
import socket
import time
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster

from fedlora import check, identity
from fedlora.app import cells, player, terminal
from fedlora.engines import cluster, make, pool
from fedlora.tools import cli
from tests.conftest import ROOT
from tests.test_engines import fit

KILLS = "tests.apps:kills_its_node"


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    """The file in which a test says which node is to die; the nodes inherit the variable."""
    file = tmp_path_factory.mktemp("mark") / "node"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_TEST_MARK", str(file))
        yield file


@pytest.fixture(scope="module")
def nodes(mark):
    """A real cluster on this machine: a head, and one more node."""
    pool.shutdown()
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}  # a dead node is seen in 2 s instead of 10
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1)
    yield nodes
    pool.shutdown()
    nodes.shutdown()


@pytest.fixture
def config(small, nodes):
    config = small(clients_per_round=6)
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="ray", address=nodes.address, retries=0))


def inline(config):
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="inline", address=None))


def workers_on(config, app, wanted) -> None:
    """Wait until the pool has a warm worker on each of these nodes, and no other."""
    started = make(config, app).starting.result()
    deadline = time.monotonic() + 120
    while {seat.node for seat in started.idle} != set(wanted):
        assert time.monotonic() < deadline, [seat.node for seat in started.idle]
        started.admit()
        time.sleep(0.2)


def test_a_node_that_dies_in_mid_round_and_one_that_joins_leave_the_numbers_alone(config, nodes, mark) -> None:
    expected = fit(inline(config), chosen=["fedsvd"])
    head, doomed = nodes.head_node.node_id, nodes.list_all_nodes()[-1]
    for _ in range(2):  # the second time it is a node that has joined
        workers_on(config, KILLS, [head, doomed.node_id])
        mark.write_text(doomed.node_id)
        assert fit(config, KILLS, ["fedsvd"]) == expected  # retries=0: a client that is blamed would be dropped
        assert not mark.exists()  # a client was at work there
        nodes.remove_node(doomed)  # what is left of it
        doomed = nodes.add_node(num_cpus=1)


def test_a_node_that_joins_and_lacks_something_is_named_once_and_left_out(config, nodes, tmp_path) -> None:
    good = [node.node_id for node in nodes.list_all_nodes()]
    workers_on(config, KILLS, good)
    joined = [nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": path}) for path in lacking(tmp_path)]
    started, deadline = pool._pool, time.monotonic() + 120
    with terminal.notes() as notes:
        while len(notes) < 2 or started.warming or time.monotonic() > started._looked + 0.5:  # it has looked again since
            assert time.monotonic() < deadline, notes
            started.admit()
            time.sleep(0.2)
    told = sorted(notes.values(), key=len)
    place = r"^node .+ \(.+\)"
    assert re.match(place + " has torch 1.0 and not .+ as here; install .+; the node is left out$", told[1]), told
    assert re.match(place + ": a worker cannot start: ImportError: no such package; the node is left out$", told[0]), told
    assert {seat.node for seat in started.idle} == set(good) and not started.warming and started.nodes.free() == 0
    worker = started.nodes.place(started.actor).remote(KILLS, started.kind.driver)
    assert ray.wait([worker.warm.remote(started.experiment)], timeout=3)[0] == []  # there is a core, but on those nodes only
    ray.kill(worker)
    for node in joined:
        nodes.remove_node(node)


def lacking(folder) -> list[str]:
    """Two search paths of a node's Python: on one torch is old, on the other flwr is not there."""
    old = folder / "old" / "torch-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    (folder / "none").mkdir()
    (folder / "none" / "flwr.py").write_text("raise ImportError('no such package')")
    return [f"{folder / name}:{ROOT}" for name in ("old", "none")]


def test_who_leaves_the_cluster_leaves_it_standing_and_holds_no_core(config, nodes) -> None:
    workers_on(config, KILLS, [node.node_id for node in nodes.list_all_nodes()])
    pool.shutdown()
    assert socket.create_connection(nodes.address.rsplit(":", 1), 5)
    pool.start_ray(config.engine)
    deadline = time.monotonic() + 30
    while cluster.Nodes(0).free() != 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_node_without_the_data_is_named(config, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "sources", lambda config: None)  # the file is not here either
    config.dataset = dataclasses.replace(config.dataset, name="files", path="/nowhere/train.csv", text="text")
    with pytest.raises(check.RunError, match=r"^node .+ \(.+\): dataset.path=/nowhere/train.csv does not exist"):
        workers_on(config, "clients.app:app", ["never"])


def test_a_node_with_other_versions_is_refused_with_the_difference(config, monkeypatch) -> None:
    there = cluster.versions()
    monkeypatch.setattr(cluster, "versions", lambda: there | {"torch": "1.0"})
    told = rf"^node .+ has torch {there['torch']} and not 1.0 as here; install the same versions on every node$"
    with pytest.raises(check.RunError, match=told.replace("+cpu", r"\+cpu")):
        workers_on(config, "clients.app:app", ["never"])


def test_a_node_with_other_files_is_refused(config, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "sources", lambda config: identity.sources(config) | {"data": "0" * 64})
    with pytest.raises(
        check.RunError, match=r"^node .+ \(.+\) differs from the command in data; copy the command's files there$"
    ):
        workers_on(config, "clients.app:app", ["never"])
    (summary,) = player.Player.play(SimpleNamespace(stopped=False), [config.to_json()], [cluster.sources(config)])
    assert summary["status"] == "failed" and "differs from the command in data" in summary["reason"]


def test_cells_side_by_side_run_on_the_cluster_and_on_a_node_that_joins(nodes, tmp_path, capsys, monkeypatch) -> None:
    pool.shutdown()  # so that the sweep is the one to join
    begin, seat, players, more = cells.SideBySide._begin, cells.SideBySide._seat, [], []

    def begins(self, *cell) -> None:
        """Another node comes when the first cell begins, and it is there before the next one does."""
        more.append(more or nodes.add_node(num_cpus=1))
        while len(players) == 2 and not self.nodes.free():
            time.sleep(0.1)
        begin(self, *cell)

    monkeypatch.setattr(cells.SideBySide, "_begin", begins)
    monkeypatch.setattr(cells.SideBySide, "_seat", lambda self: players.append(self) or seat(self))
    swept = ["-m", "clients=2", "rounds=1", "fraction=null", "train.steps=1", "device=cpu", "seed=1,2,3,4"]
    swept += [f"results={tmp_path}", f"engine.address={nodes.address}"]
    assert cli.main(ROOT / "configs", swept) == 0
    assert "4 of 4 cells side by side, 2 at a time" in capsys.readouterr().out
    assert cluster.joined == nodes.address and len(players) == 3
    nodes.remove_node(more[0])


@pytest.mark.parametrize("deaf", [False, True])
def test_an_address_that_nobody_answers_ends_with_one_sentence(capsys, tmp_path, deaf) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if deaf:
            listener.listen()
        assert cli.main(ROOT / "configs", [f"engine.address={address}", f"results={tmp_path}"]) == 2
    cure = "start a cluster (ray start --head --port=6379 --disable-usage-stats), or correct the address"
    assert capsys.readouterr().err == f"error: engine.address={address}: no Ray cluster answers there; {cure}\n"


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:0", "ray://head:10001", "http://head:6379"])
def test_an_address_that_is_none_is_refused(small, address) -> None:
    with pytest.raises(check.ConfigError, match=r"must be auto, or host:port of the head node"):
        small(engine__name="ray", engine__address=address)


def test_an_engine_that_cannot_use_a_cluster_refuses_one(small) -> None:
    with pytest.raises(
        check.ConfigError, match=r"engine.address=auto needs engine=ray, and engine=inline runs on this machine"
    ):
        small(engine__name="inline", engine__address="auto")


def test_auto_is_what_the_user_started_and_never_the_private_ray_of_another_run(monkeypatch, tmp_path) -> None:
    """One that ray.init starts is a process of this machine, and no cluster that anybody was asked to join."""
    from ray._private import services

    pool.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"127.0.0.1:1"})  # a private Ray, as Ray itself looks for one
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)  # nobody has called `ray start`
    with pytest.raises(check.ConfigError, match=r"^engine.address=auto: no cluster was started on this machine by ray start; "):
        cluster.join("auto", "clients.app:app")
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: "127.0.0.1:2")
    monkeypatch.setattr(cluster, "_answers", lambda place: False)
    with pytest.raises(check.ConfigError, match=r"^engine.address=auto: no Ray cluster answers at \S+:2; "):
        cluster.join("auto", "clients.app:app")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:3")
    with pytest.raises(check.ConfigError, match=r"no Ray cluster answers at \S+:3; "):
        cluster.join("auto", "clients.app:app")

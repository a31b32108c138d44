"""Real devices: a SuperLink with TLS and node authentication, three devices with three files, processes of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedlora.app import experiment
from fedlora.deploy.account import LEDGER, Account
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason
from fedlora.privacy.ledger import Ledger
from tests.conftest import ROOT, run_py, write_digits

PATIENCE = 400  # seconds for anything, on a machine that is busy with other work
SEED, BUDGETS = 7, (8.0, 60.0, 60.0)
CLASSES = "dataset.classes=[0,1,2,3,4,5,6,7,8,9]"
SETTINGS = [
    "strategy=fedsvd", "clients=3", "fraction=1", "train.steps=4", f"seed={SEED}", "dataset=files", "dataset.image=image",
    CLASSES, "privacy=record", "device=cpu",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(happened, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.2)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


class Federation:
    """A server and its devices on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.processes = folder, free_port(), []
        scripts = str(Path(sys.executable).parent)
        self.environment = os.environ | {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(folder / "server"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        write_digits(folder / "data", 3, each=48)
        for keys in ("keys", "other"):  # the second with a CA that the server's certificate is not from
            script = ROOT / "examples" / "edge" / "certificates.sh"
            subprocess.run([script, folder / keys, "127.0.0.1", "0", "1", "2", "stranger"], check=True, capture_output=True)
        (folder / "server").mkdir()
        (folder / "server" / "config.toml").write_text(
            f'[superlink.test]\naddress = "127.0.0.1:{self.port}"\nroot-certificates = "{folder}/keys/ca.crt"\n'
        )

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(word) for word in command], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def serve(self) -> None:
        keys = self.folder / "keys"
        self.start(
            "superlink", "flower-superlink", "--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.pem",
            "--ssl-keyfile", keys / "server.key", "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", self.port, "--database", self.folder / "server" / "state.db",
        )  # fmt: skip
        until(lambda: "Uvicorn running" in self.log("superlink"), "the SuperLink")
        registering = [self.start("register", "flwr", "supernode", "register", keys / f"{k}.pub", "test") for k in range(3)]
        assert [process.wait(PATIENCE) for process in registering] == [0, 0, 0]

    def device(
        self, k: int, name: str = "", keys: str = "keys", key: str = "", epsilon: float = 0.0, wait: float = PATIENCE
    ) -> subprocess.Popen[bytes]:
        data, ca, own = self.folder / "data", self.folder / keys / "ca.crt", self.folder / "keys" / (key or str(k))
        return self.start(
            name or f"device-{k}", sys.executable, "-m", "fedlora.deploy.client", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", ca, "--key", own, "--client", k, "--data", data / f"device-{k}.jsonl", "--image", "image",
            "--device", "cpu", "--epsilon", epsilon or BUDGETS[k], "--state", self.state(name or k), "--port", free_port(),
            "--wait", wait,
        )  # fmt: skip

    def devices(self) -> list[subprocess.Popen[bytes]]:
        """Those that run. The SuperNode of one that is killed ends by itself."""
        return [process for process in self.processes if "fedlora.deploy.client" in process.args and process.poll() is None]

    def server_app(self) -> psutil.Process:
        """The process of the run that is at work."""
        (superlink,) = [process for process in self.processes if "flower-superlink" in process.args]
        below = psutil.Process(superlink.pid).children(recursive=True)
        alive = [process for process in below if process.status() != psutil.STATUS_ZOMBIE]
        (found,) = [process for process in alive if "flwr-serverapp" in " ".join(process.cmdline())]
        return found

    def state(self, name: object) -> Path:
        return self.folder / f"state-{name}"

    def account(self, k: int) -> Account:
        """The device's books, as it finds them when it starts; it must not be running."""
        return Account(self.state(k), Limits(BUDGETS[k], 1e-5, 1.0, 1000))

    def close(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    federation = Federation(tmp_path_factory.mktemp("edge"))
    try:
        federation.serve()
        for k in range(3):
            federation.device(k)
        yield federation
    finally:
        federation.close()


def deploy(federation, *settings: str) -> list[str]:
    server = [*SETTINGS, "deploy=test", f"dataset.test={federation.folder}/data/test.jsonl", f"patience={PATIENCE}"]
    return [*server, f"results={federation.folder}/results", *settings]


def test_three_devices_train_what_a_simulation_would(federation, small) -> None:
    """The same records of the same sizes, the same ledgers; the noise is the devices' own (tests/test_federation.py injects
    the simulation's, and finds its adapter bit for bit)."""
    command = deploy(federation, "name=deployed", "rounds=3", "privacy.epsilon=6")
    done = run_py(*command, env=federation.environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    classes = [str(digit) for digit in range(10)]
    data = {"path": f"{federation.folder}/data/all.jsonl", "test": f"{federation.folder}/data/test.jsonl"}
    config = small(
        clients=3, clients_per_round=3, rounds=3, seed=SEED, partition__name="natural", privacy__name="record",
        privacy__epsilon=6.0, train__steps=4, dataset__name="files", dataset__image="image", dataset__group="device",
        dataset__classes=classes, **{f"dataset__{key}": value for key, value in data.items()}, name="simulated",
    )  # fmt: skip
    experiment.run(config, time.perf_counter())
    simulated, deployed = Path(config.results) / "simulated", federation.folder / "results" / "deployed"
    assert (deployed / "privacy.json").read_bytes() == (simulated / "privacy.json").read_bytes()
    assert {path.name for path in deployed.iterdir()} == {path.name for path in simulated.iterdir()}
    ours, theirs = rows_of(deployed), rows_of(simulated)
    for key in ("epsilon_max", "bytes_up", "bytes_down"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs]
    assert ours[0]["accuracy"] == theirs[0]["accuracy"] and ours[-1]["update_norm"] != theirs[-1]["update_norm"]
    assert all(row["drops"] == {} for row in ours[1:])
    assert "client_loss" in theirs[1] and not {"client_loss", "client_clipped", "client_noise_product"} & ours[1].keys()
    server = Ledger.load(deployed / "privacy.json")
    for k in range(3):
        own = [json.loads(line) for line in (federation.state(k) / LEDGER).read_text().splitlines()]
        assert [row["round"] for row in own] == [1, 2, 3]
        spent = Ledger()
        for row in own:
            spent.spend(k, row["noise_multiplier"], row["sampling_rate"], row["steps"])
        assert spent.history(k) == server.history(k)
        assert federation.state(k).stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in federation.state(k).rglob("*")} == {0}


def test_a_plan_comes_from_a_roll_call_and_trains_nothing(federation) -> None:
    before = [(federation.state(k) / LEDGER).read_text() for k in range(3)]
    command = deploy(federation, "name=planned", "rounds=2", "privacy.epsilon=6", "plan=true")
    done = run_py(*command, env=federation.environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48 each" in done.stdout and "ε = 6" in done.stdout and "6 client rounds" in done.stdout
    assert [(federation.state(k) / LEDGER).read_text() for k in range(3)] == before
    assert not (federation.folder / "results" / "planned").exists()


def test_ctrl_c_stops_the_run_on_the_server_too_and_leaves_no_process(federation) -> None:
    command = deploy(federation, "name=stopped", "rounds=9", "privacy.epsilon=6")
    stopped = federation.start("stopped", sys.executable, ROOT / "run.py", *command)
    until(lambda: "on the SuperLink of test" in federation.log("stopped"), "the start of the run")
    number = federation.log("stopped").split()[1]
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(PATIENCE) == 130 and "stopped by Ctrl-C after round 0 of 9" in federation.log("stopped")
    summary = json.loads((federation.folder / "results" / "stopped" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 0)
    assert not [p for p in psutil.process_iter(["cmdline"]) if number in (p.info["cmdline"] or ())]
    asking = federation.start("asking", "flwr", "list", "test", "--run-id", number, "--format", "json")
    assert asking.wait(PATIENCE) == 0 and '"finished:stopped"' in federation.log("asking")
    (superlink,) = [process.pid for process in federation.processes if "flower-superlink" in map(str, process.args)]
    there = lambda: psutil.Process(superlink).children(recursive=True)  # noqa: E731  # one that has ended may not be reaped yet
    until(lambda: all(p.name() != "flwr-serverapp" or p.status() == psutil.STATUS_ZOMBIE for p in there()), "its end")


def test_a_key_that_is_not_registered_and_a_certificate_of_another_ca_are_refused(federation) -> None:
    stranger = federation.device(0, "stranger", key="stranger", wait=5)
    misled = federation.device(0, "misled", keys="other", wait=5)
    assert [process.wait(PATIENCE) for process in (stranger, misled)] == [1, 1]
    assert "Failed to activate SuperNode" in federation.log("stranger")
    assert "certificate verify failed" in federation.log("misled")
    assert not (federation.state("stranger") / LEDGER).exists()


def test_a_device_without_budget_and_one_that_is_killed_are_named_and_the_run_goes_on(federation) -> None:
    """After the first test: device 0 has spent 6 of its 8. Device 1 loses its power in mid-round, and is started again at
    once, most often while the SuperLink still takes it for connected."""
    (killed,) = [process for process in federation.devices() if "device-1.jsonl" in " ".join(process.args)]
    rounds = federation.folder / "results" / "bumpy" / "rounds.jsonl"
    bumpy = ["privacy.epsilon=null", "privacy.noise_multiplier=1.5", "train.steps=300", "rounds=2", "min_success=0.3"]
    command = deploy(federation, "name=bumpy", "round_timeout=200", *bumpy)
    running = federation.start("bumpy", sys.executable, ROOT / "run.py", *command)
    ledger = federation.state(1) / LEDGER
    until(lambda: ledger.read_text().count("\n") == 4, "the round in the ledger of device 1")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = federation.account(1)
    assert [row["steps"] for row in before.rows] == [4, 4, 4, 300]  # written before the steps were taken
    before.close()
    federation.device(1)
    until(lambda: rounds.exists() and rounds.read_text().count("\n") == 2, "the end of the round without device 1")
    assert running.wait(PATIENCE) == 0, federation.log("bumpy")
    _, first, second = rows_of(rounds.parent)
    assert first["cohort"] == second["cohort"] == [0, 1, 2]
    assert set(first["drops"]) == {"0", "1"} and set(second["drops"]) == {"0"}
    for row in (first, second):
        assert row["drops"]["0"] == Reason.SPENT.value
    assert "this device has spent ε = 5.9" in federation.log("device-0") and "its own budget of 8" in federation.log("device-0")
    said = federation.log("device-1")  # whether it was refused at all depends on how long its start took
    assert said.count("refused this device") == said.count("Failed to activate SuperNode")
    assert json.loads((rounds.parent / "summary.json").read_text())["status"] == "finished"
    assert (federation.state(0) / LEDGER).read_text().count("\n") == 3  # nothing was spent on what was refused


def test_a_run_that_fails_exits_with_1_and_says_why(federation) -> None:
    """Every device refuses a bound on gradients above its own."""
    command = deploy(federation, "name=weak", "rounds=1", "privacy.epsilon=1", "privacy.clip=5")
    done = run_py(*command, env=federation.environment, timeout=PATIENCE)
    assert done.returncode == 1
    assert Reason.BEYOND_LIMITS.value in done.stderr
    assert "this device clips at 1 or below (--clip), the experiment has privacy.clip=5" in federation.log("device-0")
    assert json.loads((federation.folder / "results" / "weak" / "summary.json").read_text())["status"] == "failed"


def test_killed_on_every_side_the_same_command_goes_on_to_the_same_bits(federation, small) -> None:
    """Clients keep a B of their own and what int8 has lost. Round 2 is under way when the server and a device lose power."""
    for process in federation.devices():
        process.kill()
        process.wait()
    _, stopped = [federation.device(k, epsilon=float("inf")) for k in range(2)]
    everything = (federation.folder / "data" / "all.jsonl").read_text().splitlines(keepends=True)
    (federation.folder / "data" / "two.jsonl").write_text("".join(line for line in everything if "device-2" not in line))
    config = small(
        strategy__name="fedsa_lora", evaluate__holdout=0.2, evaluate__every=2, compression__up="int8", clients=2, rounds=2,
        clients_per_round=2, seed=SEED, partition__name="natural", train__steps=4, dataset__name="files",
        dataset__image="image", dataset__group="device", dataset__classes=[str(digit) for digit in range(10)],
        dataset__path=f"{federation.folder}/data/two.jsonl", dataset__test_fraction=0.0, name="simulated",
    )  # fmt: skip
    experiment.run(config, time.perf_counter())
    command = ["strategy=fedsa_lora", "evaluate.holdout=0.2", "evaluate.every=2", "compression.up=int8", "privacy=none"]
    command += ["clients=2", "fraction=1", "rounds=2", "train.steps=4", f"seed={SEED}", "dataset=files", "dataset.image=image"]
    command += [CLASSES, "device=cpu", "deploy=test", f"patience={PATIENCE}", "name=killed"]
    command += [f"results={federation.folder}/results"]
    driver = federation.start("killed", sys.executable, ROOT / "run.py", *command)
    home, server = federation.folder / "results" / "killed", federation.folder / "server" / "fedlora" / "killed"
    until(lambda: (server / "rounds.jsonl").exists() and len(rows_of(server)) == 2, "the end of round 1")
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: list(federation.state(0).glob("kept/*/round-00002")), "round 2 on device 0")
    app = federation.server_app()
    for process in (app, driver, stopped):
        process.kill()
    number = (home / "flower-run").read_text()
    federation.device(1, epsilon=float("inf"))
    stop = federation.start("stop", "flwr", "stop", number, "test")  # else the SuperLink takes a minute to miss the ServerApp
    assert stop.wait(PATIENCE) == 0
    done = run_py(*command, env=federation.environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    simulated = Path(config.results) / "simulated"
    assert json.loads((home / "summary.json").read_text())["resumed"] == [1]
    assert [line.split(":")[0] for line in federation.log("device-0").splitlines() if line.startswith("round")][-3:] == [
        "round 1", "round 2", "round 2"
    ]  # fmt: skip
    file = "adapter/adapter_model.safetensors"
    assert (home / file).read_bytes() == (simulated / file).read_bytes()
    ours, theirs = rows_of(home), rows_of(simulated)
    for key in ("round", "client_accuracy", "client_loss", "update_norm", "bytes_up", "bytes_down", "drops"):
        assert [row.get(key) for row in ours] == [row.get(key) for row in theirs]
    assert {path.name for path in home.iterdir()} == {path.name for path in simulated.iterdir()}

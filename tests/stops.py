"""A signal at forty moments of a command, from its first step to its last: `python -m tests.stops [--times 3]`.

Each must end within seconds with the status of the signal, in a line or two, with whole files and without a process left.
A moment is an event that can be seen from outside, and so many seconds later. tests/test_stops.py takes six of them.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from safetensors import safe_open

from fedlora.app.checkpoint import Checkpoint
from tests.conftest import ROOT

PATIENCE = 500.0  # seconds for the event to come, on a busy machine
SMALL = ["device=cpu", "clients=4", "fraction=null", "train.steps=1"]
ENGINES = {"inline": ["engine.cohort=1"], "ray": ["engine.cohort=1", "engine.workers=2"], "flower": []}
LONG, SHORT = "rounds=100000", "rounds=3"


class Moment(NamedTuple):
    """When to send what, to which command."""

    engine: str
    event: str  # watched: it heeds signals; claimed: it has a results folder; ray: a Ray starts; or lines of rounds.jsonl
    later: float = 0.0
    number: int = signal.SIGINT
    more: tuple[str, ...] = (LONG,)


TERM, HUP = signal.SIGTERM, signal.SIGHUP
SWEPT = ("-m", "seed=1,2,3,4", LONG)
MOMENTS = [
    Moment("inline", "watched"), Moment("inline", "watched", 0.2, TERM), Moment("inline", "watched", 1.0),
    Moment("inline", "watched", 2.0, HUP), Moment("inline", "claimed"), Moment("inline", "claimed", 0.5, TERM),
    Moment("inline", "1"), Moment("inline", "2", 0.05, TERM), Moment("inline", "9", 0.1), Moment("inline", "20", 0.0, HUP),
    Moment("inline", "4", 0.0, TERM, (SHORT,)), Moment("inline", "4", 0.3, more=(SHORT,)),
    Moment("inline", "4", 1.0, more=(SHORT,)),
    Moment("ray", "watched", 0.1), Moment("ray", "watched", 0.5, TERM), Moment("ray", "watched", 1.0),
    Moment("ray", "claimed"), Moment("ray", "claimed", 1.0), Moment("ray", "claimed", 2.0, TERM),
    Moment("ray", "ray"), Moment("ray", "ray", 0.3, TERM), Moment("ray", "ray", 1.0), Moment("ray", "ray", 2.0, TERM),
    Moment("ray", "ray", 3.0), Moment("ray", "1"), Moment("ray", "9", 0.05, TERM), Moment("ray", "40"),
    Moment("ray", "4", 0.0, more=(SHORT,)), Moment("ray", "4", 1.0, TERM, (SHORT,)),
    Moment("ray", "watched", 1.0, more=SWEPT), Moment("ray", "ray", 0.0, more=SWEPT), Moment("ray", "ray", 1.0, TERM, SWEPT),
    Moment("ray", "ray", 2.5, more=SWEPT), Moment("ray", "claimed", 0.0, TERM, SWEPT), Moment("ray", "1", 0.0, more=SWEPT),
    Moment("ray", "9", 0.1, TERM, SWEPT), Moment("inline", "3", 0.0, more=SWEPT),
    Moment("flower", "ray", 0.5), Moment("flower", "1", 0.0, TERM), Moment("flower", "3"),
]  # fmt: skip


def tried(moment: Moment, results: Path, limit: float = 5.0) -> tuple[float, str]:
    """Seconds from the signal to the end, and what is wrong with how the command ended; an empty text if nothing is."""
    engine = [f"engine={moment.engine}", *ENGINES[moment.engine]]
    command = [sys.executable, str(ROOT / "run.py"), *moment.more, *SMALL, *engine, f"results={results}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=results, start_new_session=True
    ) as process:
        seen: set[psutil.Process] = set()
        _await(moment, results, process, seen)
        before = {folder for folder in _folders(results) if _lines(folder)}
        ended = process.poll() is not None
        process.send_signal(moment.number)
        sent = time.monotonic()
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return 60.0, "it did not end"
    took = time.monotonic() - sent
    faults = [] if took < limit else [f"it took {took:.1f} s"]
    statuses = {folder.name: _status(folder) for folder in before}
    finished = "finished" in statuses.values() and moment.more == (SHORT,)
    if ended and not finished:
        faults.append("it ended by itself")
    if process.returncode != 128 + moment.number and not (finished and process.returncode == 0):
        faults.append(f"its status is {process.returncode}")
    if err.count("\n") > 2 or any(word in out + err for word in ("Traceback", "***", "Error", "Exception", "[E ")):
        faults.append(f"it says {out[-500:]} {err[-1500:]}")
    allowed = {"interrupted", "finished"} | ({None} if moment.more == (SHORT,) else set())  # cut off as it was to be finished
    faults += [f"{name} has the status {status}" for name, status in statuses.items() if status not in allowed]
    faults += _damage(results)
    left = psutil.wait_procs(seen, timeout=3)[1]
    faults += [f"{process} is left" for process in left if process.is_running()]
    return took, "; ".join(faults)


def _await(moment: Moment, results: Path, process: subprocess.Popen, seen: set[psutil.Process]) -> None:
    """Until the moment has come, or the command has ended; its processes are added to `seen`."""
    deadline, come = time.monotonic() + PATIENCE, False
    while process.poll() is None and not come:
        assert time.monotonic() < deadline, f"{moment}: nothing came"
        come = _come(moment.event, results, process, seen)
        time.sleep(0.01)
    until = time.monotonic() + moment.later
    while process.poll() is None and time.monotonic() < until:
        _come(moment.event, results, process, seen)
        time.sleep(0.01)
    _come(moment.event, results, process, seen)


def _come(event: str, results: Path, process: subprocess.Popen, seen: set[psutil.Process]) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        seen.update(psutil.Process(process.pid).children(recursive=True))
        if event == "watched":
            caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line)
            return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
        if event == "ray":
            return any(each.is_running() and each.name() == "gcs_server" for each in seen)
        if event == "claimed":
            return bool(_folders(results))
        return any(_lines(folder) >= int(event) for folder in _folders(results))
    return False


def _folders(results: Path) -> list[Path]:
    return [lock.parent for lock in results.rglob(".lock")]


def _lines(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return (folder / "rounds.jsonl").read_text().count("\n")
    return 0


def _status(folder: Path) -> str | None:
    file = folder / "summary.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def _damage(results: Path) -> list[str]:
    """What is not whole in the results."""
    faults = [f"{file} is left" for file in results.rglob(".*.tmp")] if list(results.rglob("summary.json")) else []
    for file in results.rglob("*.json*"):
        if not file.name.startswith("."):
            for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
                json.loads(text)
    for file in results.rglob("*.safetensors"):
        if file.parent.name == "checkpoints":
            Checkpoint.load(file)
        elif not any(part.endswith(".tmp") for part in file.parts):
            with safe_open(file, "np") as arrays:
                assert len(list(arrays.keys()))
    return faults


def main(times: int) -> int:
    """Every moment, so many times; the exit status."""
    bad, longest = 0, 0.0
    for number, moment in enumerate(MOMENTS * times):
        with tempfile.TemporaryDirectory() as results:
            took, fault = tried(moment, Path(results))
        longest, bad = max(longest, took), bad + bool(fault)
        print(f"{number + 1:3} {moment.engine} {moment.event} + {moment.later} s, {signal.Signals(moment.number).name}, "
              f"{' '.join(moment.more)}: {took:.2f} s {fault}", flush=True)  # fmt: skip
    print(f"{bad} of {len(MOMENTS) * times} ended otherwise than they should; the longest took {longest:.2f} s")
    return bool(bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="how often each moment is tried")
    sys.exit(main(parser.parse_args().times))

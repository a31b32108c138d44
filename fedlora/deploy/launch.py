"""The command line's side of a deployment: starts the run on a SuperLink, follows it, brings its records home.

Flower's own command line does the talking (`flwr run`, `log`, `list`, `stop`), with the connections of its configuration
($FLWR_HOME/config.toml); it exits with 0 even where the run failed, so what counts is the summary that comes back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora import disk, messages, terminal
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.deploy.courier import Receiver
from fedlora.records import SUMMARY, Recorder

ENDED = "finished"  # how the status of a run begins that goes on no more
RUN = "flower-run"  # a file of the results folder, while its records come: the number of the run


def run(config: Config, project: Path) -> dict[str, Any]:
    """Run the experiment on the SuperLink of the connection `config.deploy` and return its summary, as `experiment.run` does.

    `project` is the folder of pyproject.toml. Raises ConfigError before anything is started, RunError where the run fails.
    """
    recorder = Recorder(config)
    if recorder.finished:
        terminal.say(f"{recorder.folder} is finished, with these settings; overwrite=true runs it again")
        return recorder.summary()
    recorder.claim()
    connection = str(config.deploy)
    number, details = underway(recorder, connection), ""
    try:
        if number:
            terminal.say(f"run {number} on the SuperLink of {connection} still goes on, and is followed from here")
            details = bring(recorder, number, connection)
        if not number or not recorder.summary():
            number = start(config, connection, project)
            terminal.say(f"run {number} on the SuperLink of {connection}")
            details = bring(recorder, number, connection)
    except KeyboardInterrupt:
        if number:
            flwr("stop", number, connection)
        (recorder.folder / RUN).unlink(missing_ok=True)
        recorder.close({"status": "interrupted", "reason": "stopped by Ctrl-C"})
        return recorder.summary()
    summary = recorder.summary()
    if not summary:
        reason = f"run {number} ended without a summary: {details}; flwr log {number} {connection} has more"
        recorder.close({"status": "failed", "reason": reason})
        raise RunError(reason)
    if summary["status"] == "failed":
        raise RunError(summary["reason"])
    return summary


def start(config: Config, connection: str, project: Path) -> str:
    """The number of the new run. The experiment goes along as one JSON value."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(f"{messages.EXPERIMENT} = {json.dumps(config.to_json(), ensure_ascii=False)}\n")
        file.flush()
        return str(_answer("run", str(project), connection, "--run-config", file.name)["run-id"])


def underway(recorder: Recorder, connection: str) -> str:
    """The number of the run whose records an earlier process was bringing here, if it still goes on; else an empty text."""
    if recorder.config.overwrite:
        return ""
    try:
        number = (recorder.folder / RUN).read_text(encoding="utf-8")
        return "" if str(_about(number, connection)["status"]).startswith(ENDED) else number
    except (OSError, RunError):  # a SuperLink that does not know it any more, most likely
        return ""


def bring(recorder: Recorder, number: str, connection: str) -> str:
    """Takes all records of the run, from its beginning on; returns what Flower says of its end.

    The number stays in the folder until then, so that the same command finds the run again.
    """
    disk.write(recorder.folder / RUN, number.encode())
    recorder.begin()
    details = follow(recorder, number, connection)
    (recorder.folder / RUN).unlink()
    return details


def follow(recorder: Recorder, number: str, connection: str) -> str:
    """Takes the records as they come, until the run is over; returns what Flower says of its end."""

    def row(line: str) -> None:
        recorder.round(json.loads(line))

    def file(name: str, content: bytes) -> None:
        if name == SUMMARY:
            recorder.close(json.loads(content))
            return
        path = recorder.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write(path, content)

    receiver, last = Receiver(terminal.say, row, file), ""
    while True:
        for line in _log(number, connection):  # ends where the connection does; it is read from the beginning then
            last = last if receiver.take(line) or not line.strip() else line.strip()
        about = _about(number, connection)
        if str(about["status"]).startswith(ENDED):
            return str(about.get("details") or f"{about['status']}, {last}")


def _about(number: str, connection: str) -> dict[str, Any]:
    """What the SuperLink knows of the run. Raises RunError where that is nothing."""
    about: dict[str, Any] = _answer("list", connection, "--run-id", number)["runs"][0]
    return about


def _log(number: str, connection: str) -> Iterator[str]:
    """The lines of the run's log."""
    command = [sys.executable, "-m", "flwr.cli.app", "log", number, connection, "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        yield from process.stdout


def _answer(*arguments: str) -> dict[str, Any]:
    """What Flower's command line answers, as JSON. Raises RunError where it answers nothing or no success."""
    done = flwr(*arguments, "--format", "json")
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if not answer.get("success"):
        said = str(answer.get("error-message") or done.stderr.strip() or done.stdout.strip()).strip().splitlines()
        raise RunError(f"flwr {arguments[0]} failed: {said[-1] if said else 'no answer'}")
    return answer


def flwr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Flower's command line, in a process of its own."""
    command = [sys.executable, "-m", "flwr.cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")

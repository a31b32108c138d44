"""The command line's side of a deployment: starts the run on a SuperLink, follows it, brings its records home.

Flower's own command line does the talking (`flwr run`, `log`, `list`, `stop`), with the connections of its configuration
($FLWR_HOME/config.toml); it exits with 0 even where the run failed, so what counts is the summary that comes back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fedlora import interrupt, untrusted
from fedlora.app import report, terminal
from fedlora.app.folder import SUMMARY, is_summary
from fedlora.app.records import Recorder
from fedlora.arrays import messages
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.deploy.courier import LONGEST_LINE, LONGEST_TEXT, MOST_BYTES, Receiver
from fedlora.interrupt import CtrlC

ENDED = "finished"  # how the status of a run begins that goes on no more
COMPLETED = "finished:completed"  # and of one that ended without an error
OWN_PROCESS: dict[str, Any] = {"text": True, "encoding": "utf-8", "start_new_session": True}  # Ctrl-C is for us
RETRY = 3.0  # seconds until a SuperLink out of reach is tried again
RUN = "flower-run"  # a file of the results folder, while its records come: the number of the run


def run(config: Config, project: Path) -> dict[str, Any]:
    """Run the experiment on the SuperLink of the connection `config.deploy` and return its summary, as `experiment.run` does.

    `project` is the folder of pyproject.toml. Raises ConfigError before anything is started, RunError where the run fails;
    Ctrl-C stops the run there, with what has come of it.
    """
    recorder = Recorder(config, launched=True)
    if not recorder.finished:
        with recorder.claim():
            return summary_of(recorder, project)
    terminal.finished(recorder.folder)
    return recorder.summary()


def summary_of(recorder: Recorder, project: Path) -> dict[str, Any]:
    """That of a run that goes on already, or of a new one; all its records are here then."""
    config, number, ended = recorder.config, underway(recorder), ""
    try:
        if number:
            terminal.say(f"run {number} on the SuperLink of {config.deploy} still goes on; this command follows it")
            ended = bring(recorder, number)
        if not number or not recorder.summary():
            number = start(config, project)
            ended = bring(recorder, number)
    except KeyboardInterrupt:
        (recorder.folder / RUN).unlink(missing_ok=True)
        outcome = interrupt.outcome()
        recorder.close(report.summarise(config, report.read_rounds(recorder.folder)) | outcome)
        return recorder.summary()
    summary = recorder.summary()
    if not summary:
        reason = f"run {number} ended without a summary: {ended}; flwr log {number} {config.deploy} has more"
        recorder.close({"status": "failed", "reason": reason})
        raise RunError(reason)
    if summary["status"] == "failed":
        raise RunError(summary["reason"])
    return summary


def plan(config: Config, project: Path) -> None:
    """Have the server ask the devices for their numbers of examples, and say what the experiment would come to.

    Nothing is trained, and there is no results folder. Raises RunError where it fails, such as for a device that is not there.
    """
    number = start(config, project)
    with stopping(config, number):
        ended = follow(config, number, Receiver(terminal.say, lambda line: None, lambda name, content: None))
    if not ended.startswith(COMPLETED):
        raise RunError(f"run {number} ended without a plan: {ended}; flwr log {number} {config.deploy} has more")


def start(config: Config, project: Path) -> str:
    """The number of the new run. The experiment goes along as one JSON value. On Ctrl-C it is stopped at once."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file, CtrlC(later=True) as ctrl_c:
        file.write(f"{messages.EXPERIMENT} = {json.dumps(config.to_json(), ensure_ascii=False)}\n")
        file.flush()
        number = str(_answer("run", str(project), str(config.deploy), "--run-config", file.name)["run-id"])
    with stopping(config, number):
        ctrl_c.check()
        terminal.say(f"run {number} on the SuperLink of {config.deploy}")
    return number


def underway(recorder: Recorder) -> str:
    """The number of the run whose records an earlier process was bringing here, if it still goes on; else an empty text."""
    if recorder.config.overwrite:
        return ""
    try:
        number = (recorder.folder / RUN).read_text(encoding="utf-8")
        about = _answer("list", str(recorder.config.deploy), "--run-id", number)["runs"][0]
    except (OSError, RunError):  # a SuperLink that does not know it any more, most likely
        return ""
    return "" if str(about["status"]).startswith(ENDED) else number


def bring(recorder: Recorder, number: str) -> str:
    """Takes all records of the run, from its beginning on; returns how it ended, as Flower says it.

    The number stays in the folder until then, so that the same command finds the run again.
    """

    def row(line: str) -> None:
        recorder.round(_object(line))

    def file(name: str, content: bytes) -> None:
        if name == SUMMARY:
            recorder.close(_summary(content))
        else:
            recorder.put(name, content)

    with stopping(recorder.config, number):
        recorder.put(RUN, number.encode())
        recorder.begin()
        room = MOST_BYTES * (16 if recorder.config.save_merged else 1)
        ended = follow(recorder.config, number, Receiver(terminal.say, row, file, room))
    (recorder.folder / RUN).unlink()
    return ended


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object that the server sent. Raises RunError for anything else, which its folder has where it is damaged."""
    try:
        content: dict[str, Any] = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        json.dumps(content, indent=2)  # as a summary is written: nothing that is nested too deep for it
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"the server sent records that cannot be read ({untrusted.text(str(error))}); look into its folder of this run"
        ) from error
    return content


def _summary(content: bytes) -> dict[str, Any]:
    """A summary that the server sent, its texts for a terminal. Raises RunError for what no run leaves."""
    summary = _object(content)
    if not is_summary(summary):
        raise RunError("the server sent a summary that no run leaves; look into its folder of this run")
    texts = {name: untrusted.text(summary[name], LONGEST_TEXT) for name in ("strategy", "reason") if summary.get(name)}
    notes = {"notes": [untrusted.text(note, LONGEST_TEXT) for note in summary["notes"]]} if "notes" in summary else {}
    return {"reason": ""} | summary | texts | notes if summary["status"] == "interrupted" else summary | texts | notes


@contextmanager
def stopping(config: Config, number: str) -> Iterator[None]:
    """Ctrl-C within stops the run on the SuperLink too."""
    with CtrlC() as ctrl_c:  # which acts where a shell started the command in the background, too
        try:
            yield
            ctrl_c.check()
        except KeyboardInterrupt:
            ctrl_c.later = True
            flwr("stop", number, str(config.deploy))
            raise


def follow(config: Config, number: str, receiver: Receiver) -> str:
    """Takes what the run says as it comes, until it is over; returns how it ended, as Flower says it.

    Where the SuperLink is out of reach it is tried for `config.patience` seconds; then RunError.
    """
    connection, last = str(config.deploy), ""
    while True:
        with closing(_log(number, connection)) as lines:  # ends where the connection does, and begins anew then
            for line in lines:
                last = last if receiver.take(line) or not line.strip() else line.strip()
        about = _patiently(config.patience, "list", connection, "--run-id", number)["runs"][0]
        if str(about["status"]).startswith(ENDED):
            return untrusted.text(f"{about['status']}, {about['status-details'] or last}", LONGEST_TEXT)


def _patiently(patience: float, *arguments: str) -> dict[str, Any]:
    """What Flower's command line answers; where it fails, it is asked again for `patience` seconds."""
    deadline = None
    while True:
        try:
            return _answer(*arguments)
        except RunError as error:
            said = str(error).rstrip(".")
            if deadline is None:
                deadline = time.monotonic() + patience
                terminal.say(f"{said}; trying again for patience={patience:g} s, while the run goes on")
            elif time.monotonic() > deadline:
                raise RunError(f"{said}, for patience={patience:g} s; the run may go on there") from error
        time.sleep(RETRY)


def _log(number: str, connection: str) -> Generator[str]:
    """The lines of the run's log."""
    command = [sys.executable, "-m", "flwr.cli.app", "log", number, connection, "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **OWN_PROCESS) as process:
        assert process.stdout is not None
        try:
            yield from iter(lambda: process.stdout.readline(LONGEST_LINE), "")  # type: ignore[union-attr]
        finally:
            process.terminate()


def _answer(*arguments: str) -> dict[str, Any]:
    """What Flower's command line answers, as JSON. Raises RunError where it answers nothing or no success."""
    done = flwr(*arguments, "--format", "json")
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if not answer.get("success"):
        said = str(answer.get("error-message") or done.stderr.strip() or done.stdout.strip()).strip().splitlines()
        raise RunError(f"flwr {arguments[0]} failed: {untrusted.text(said[-1], LONGEST_TEXT) if said else 'no answer'}")
    return answer


def flwr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Flower's command line, in a process of its own."""
    command = [sys.executable, "-m", "flwr.cli.app", *arguments]
    return subprocess.run(command, capture_output=True, **OWN_PROCESS)

"""What a run says while it goes: settings, derived values, progress. A bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedlora.app import naming, records
from fedlora.config import Config
from strategies.base import RoundReport

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 200  # a pipe has no width, and a table cut at 80 columns is of no use in a file


def size(count: float) -> str:
    """Bytes for people: 512 B, 1.5 kB, 2.0 MB (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def finished(folder: Path) -> None:
    """Say that a run need not be run."""
    say(f"{folder} is finished, with these settings; overwrite=true runs it again")


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 12 min, 3.5 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_said: ContextVar[dict[Any, str] | None] = ContextVar("said", default=None)  # of the run that goes on here
_usual = warnings.showwarning


def _show(message: Warning | str, category: type[Warning], *place: Any) -> None:
    said, kind = _said.get(), str(message) if getattr(category, "each", False) else category
    if said is None or not category.__module__.startswith("fedlora."):
        _usual(message, category, *place)
    elif kind not in said:
        said[kind] = str(message)
        say(f"note: {message}")


@contextmanager
def notes() -> Iterator[dict[Any, str]]:
    """Within, a warning of ours is one line, once for each kind or text; yields what was said. Runs in step have their own."""
    warnings.showwarning = _show  # type: ignore[assignment]  # and stays: elsewhere it does what is usual
    warnings.filterwarnings("always", module="fedlora")  # once a run, where Python would say it once a process
    said: dict[Any, str] = {}
    token = _said.set(said)
    try:
        yield said
    finally:
        _said.reset(token)


def say(sentence: str) -> None:
    """One line, as it is."""
    console.print(sentence, markup=False)


SERVERS_OWN = ("results", "name", "engine.", "partition.")  # with deploy


def announce(config: Config, derived: list[tuple[str, str, str]]) -> None:
    """The settings that differ from the defaults, then every derived value with its reason.

    With deploy the server sets some itself; those are not shown.
    """
    console.print(f"[bold]{config.strategy['name']}[/] on {config.dataset.name} with {config.model.name}")
    for name, value in naming.changed(config).items():
        if not (config.deploy and name.startswith(SERVERS_OWN)):
            say(f"  {name} = {value}")
    for name, value, reason in derived:
        say(f"  {name}: {value}  ({reason})")


class Bar:
    """A bar where there is a terminal to show it on; use as a context manager."""

    bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


class Rounds(Bar):
    """Shows the rounds of one run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cohort = config.cohort_size
        self.sent, self.accuracy = 0, ""
        if console.is_terminal:
            self.bar = _bar("round {task.fields[round]}", "{task.fields[text]}")
            self.task = self.bar.add_task("", total=config.rounds * self.cohort, round="0", text="starting")

    def went_on(self, rows: list[dict[str, Any]]) -> None:
        """The run goes on after these lines of rounds.jsonl, which were shown before."""
        self.sent = sum(row[way] for row in rows[1:] for way in ("bytes_up", "bytes_down"))
        if self.bar:
            self.bar.update(self.task, completed=rows[-1]["round"] * self.cohort, round=str(rows[-1]["round"]))

    def replied(self, running: RoundReport | None, count: int) -> None:
        """`count` clients have replied to what was sent last; the roll call comes before any round runs."""
        if self.bar and running:
            before = (running.round - 1) * self.cohort
            self.bar.update(self.task, completed=before + min(count, self.cohort), round=str(running.round))

    def finished(self, row: dict[str, Any]) -> None:
        """One round is over; `row` is its line of rounds.jsonl."""
        self.sent += row.get("bytes_up", 0) + row.get("bytes_down", 0)
        tested = {"accuracy", "client_accuracy_mean"} & row.keys()
        if "accuracy" in row:
            self.accuracy = f"accuracy {row['accuracy']:.3f}  loss {row['loss']:.3f}"
        elif "client_accuracy_mean" in row:
            self.accuracy = f"clients' accuracy {row['client_accuracy_mean']:.3f}"
        epsilon = f"ε {row['epsilon_max']:.2f}  " if "epsilon_max" in row else ""
        if self.bar:
            text = f"{self.accuracy}  {epsilon}sent {size(self.sent)}"
            self.bar.update(self.task, completed=row["round"] * self.cohort, round=str(row["round"]), text=text)
        else:
            say(
                f"round {row['round']}/{self.config.rounds}  {self.accuracy if tested else 'not evaluated'}  "
                f"{epsilon}up {size(row.get('bytes_up', 0))}  down {size(row.get('bytes_down', 0))}  {row['seconds']:.1f} s"
            )
        for client, reason in row.get("drops", {}).items():
            say(f"  client {client} dropped in round {row['round']}: {reason}")
        for client, reason in row.get("stops", {}).items():
            say(f"  client {client} takes no part from round {row['round']} on: it {reason}")


class Cells(Bar):
    """One bar for cells that run side by side, whose own rounds are in their folders only."""

    def __init__(self, recorders: dict[int, records.Recorder]) -> None:
        self.recorders = recorders
        if console.is_terminal:
            self.bar = _bar("{task.fields[text]}", "rounds")
            self.task = self.bar.add_task("", total=sum(each.config.rounds for each in recorders.values()), text="starting")

    def update(self, ended: Collection[int], running: Collection[int]) -> None:
        """The cells with these numbers have ended, those run; the rounds of the latter are counted in their folders."""
        if self.bar:
            done = sum(self.recorders[number].config.rounds for number in ended)
            done += sum(self.recorders[number].rounds() for number in running)
            text = f"{len(ended)} of {len(self.recorders)} cells, {len(running)} running"
            self.bar.update(self.task, completed=done, text=text)


def _bar(before: str, after: str) -> Progress:
    """A bar between two texts, then the time that went and what is left."""
    return Progress(
        TextColumn(before), BarColumn(), MofNCompleteColumn(), TextColumn(after),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def conclude(config: Config, summary: dict[str, Any], label: str = "") -> None:
    """The outcome of a run that finished, or was stopped, and where it is; `label` goes in front."""
    folder = Path(config.results) / naming.name_of(config)
    if summary["status"] == "interrupted":
        say(f"{label}{summary['reason']} after round {summary['rounds']} of {config.rounds}; its results are in {folder}")
        return
    if summary["accuracy"] is not None:
        reached = f"accuracy {summary['accuracy_before']:.4f} before, {summary['accuracy']:.4f} after"
    else:
        own = summary["client_accuracy"]
        reached = "not tested," if own is None else f"clients' own accuracy {own:.4f} after"
    say(
        f"{label}{reached} {summary['rounds']} rounds; "
        f"up {size(summary['bytes_up'])}, down {size(summary['bytes_down'])}, "
        f"{summary['seconds']:.1f} s ({summary['seconds_to_first_round']:.1f} s to the first round); {folder}"
    )


def sweep_table(rows: list[dict[str, Any]]) -> None:
    """The rows of `sweep.over_seeds`, with mean ± half-width of the 95 % interval."""

    def cell(row: dict[str, Any], column: str, show: Callable[[float], str]) -> str:
        if column not in row:
            return ""
        width = row[f"{column}_ci95"]
        return show(row[column]) + (f" ± {show(width)}" if width is not None else "")

    table(
        "mean ± 95 % interval over seeds",
        ["run", "seeds", "failed", "accuracy", "clients' accuracy", "loss", "bytes up", "seconds"],
        [
            [
                *(str(row[key]) for key in ("run", "seeds", "failed")),
                cell(row, "accuracy", "{:.4f}".format),
                cell(row, "client_accuracy", "{:.4f}".format),
                cell(row, "loss", "{:.4f}".format),
                cell(row, "bytes_up", size),
                cell(row, "seconds", "{:.1f}".format),
            ]
            for row in rows
        ],
    )


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table with left-aligned cells."""
    printed = Table(*columns, title=escape(title), title_justify="left", box=None, pad_edge=False)
    for row in rows:
        printed.add_row(*map(escape, row))
    console.print(printed)

"""The cells of a sweep at work: side by side on Ray workers where there are enough of them, else one after another.

Every worker of engine=ray holds a base model, so where the workers fit, whole cells fit too, one in each: no core waits for
the slowest client of a round, nor for the server. An engine never changes a number, so a cell that is played inline in a
worker is the run that it would have been. Of the unfinished cells as many as fill the workers are played so; the few that
are left would leave cores idle and run one after another, their clients on all the workers.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlora
from fedlora import interrupt
from fedlora.app import terminal
from fedlora.app.door import check_folders, ready
from fedlora.app.player import INTERRUPTED, Player, Seat, Summary, attempt
from fedlora.app.records import Recorder
from fedlora.app.study import Study
from fedlora.app.sweep import Cell
from fedlora.config import Config
from fedlora.interrupt import CtrlC

if TYPE_CHECKING:
    from fedlora.app.plan import Estimate

ATTEMPTS = 2  # at a cell whose worker dies
GRACE = 20.0  # seconds that a stopped cell has to save what there is


def run(cells: Sequence[Config], study: Study | None = None) -> list[Cell]:
    """Run the cells and return each with its summary; a failed one is shown and the rest go on, an interrupted one ends all.

    `study` is the sweep that they are the cells of. Raises ConfigError as `ready` does; a single cell that fails raises its
    own error.
    """
    recorders = ready(cells, study)
    if study:
        study.write()
    if len(cells) == 1:
        return [(cells[0], _conclude(recorders[0], _played(recorders[0])))]
    together, workers, gpus = side_by_side(recorders)
    ended = SideBySide(recorders, workers, gpus).run(together) if together else {}
    for number, cell in enumerate(cells):
        if any(summary["status"] == "interrupted" for summary in ended.values()):
            break
        if number not in ended:
            label = f"cell {number + 1} of {len(cells)}"
            terminal.say(f"{label}: {recorders[number].folder.name}")
            started = time.perf_counter() if ended else fedlora.STARTED
            summary = _played(recorders[number]) if recorders[number].finished else attempt(cell, started)
            ended[number] = _conclude(recorders[number], summary, f"{label}: ")
    return [(cells[number], ended[number]) for number in sorted(ended)]


def _played(recorder: Recorder) -> Summary:
    """The summary of the run, which is not run again if it has finished: nothing heavy is loaded to say so."""
    if recorder.finished:
        terminal.finished(recorder.folder)
        return recorder.summary()
    from fedlora.app import experiment

    return experiment.run(recorder.config, fedlora.STARTED)


def side_by_side(recorders: Sequence[Recorder]) -> tuple[list[tuple[int, ...]], int, float]:
    """Numbers of the cells to run side by side, those in step together; so many workers at a time, and GPUs for each.

    There are none unless the unfinished cells all ask for the same Ray workers, at least two, and fill them.
    """
    from fedlora.engines.pool import resources

    unfinished = [number for number, recorder in enumerate(recorders) if not recorder.finished]
    engines = [recorders[number].config.engine for number in unfinished]
    if not engines or any(engine.name != "ray" or engine != engines[0] for engine in engines):
        return [], 1, 0.0
    wanted = {resources(recorders[number].config) for number in unfinished}
    workers, gpus = wanted.pop()
    if wanted or workers == 1 or not _see_results(recorders[unfinished[0]].config):
        return [], 1, 0.0
    unfinished.sort(key=lambda number: _resident(recorders[number].config))
    in_step: list[tuple[int, ...]] = []
    for _, alike in groupby(unfinished, key=lambda number: _resident(recorders[number].config)):
        numbers = list(alike)
        in_step += [tuple(numbers[i : i + engines[0].share]) for i in range(0, len(numbers), engines[0].share)]
    return in_step[: len(in_step) // workers * workers], workers, gpus


def _see_results(cell: Config) -> bool:
    """Whether workers can write the results where they belong: on a cluster, if every node sees that folder."""
    if cell.engine.address is None:
        return True
    from fedlora.engines import cluster, pool

    pool.start_ray(cell.engine)
    seen = cluster.sees(Path(cell.results))
    if not seen:
        terminal.say(f"results={cell.results} is not a folder of every node, so the cells run one after another")
    return seen


def show_plan(cells: Sequence[Config], estimates: Sequence[Estimate], noise: Sequence[str]) -> None:
    """A row for each cell, its `noise` in it, and the totals of those that are not finished yet."""
    recorders = check_folders(cells)
    in_step, workers, _ = side_by_side(recorders)
    together = [number for numbers in in_step for number in numbers]
    seconds = [each.seconds_alone if number in together else each.seconds for number, each in enumerate(estimates)]
    rows = [
        [recorder.folder.name, sigma, terminal.size(each.up), terminal.size(each.down),
            "finished" if recorder.finished else terminal.duration(needed)]
        for recorder, sigma, each, needed in zip(recorders, noise, estimates, seconds, strict=True)
    ]  # fmt: skip
    terminal.table("what the cells come to", ["run", "noise", "up", "down", "time"], rows)
    busy = [0.0] * workers
    for number in together:
        busy[busy.index(min(busy))] += seconds[number]
    left = [number for number, recorder in enumerate(recorders) if not recorder.finished]
    alone = sum(seconds[number] for number in left if number not in together)
    up, down = (sum(getattr(estimates[number], way) for number in left) for way in ("up", "down"))
    how = f"; {len(together)} of them side by side, {workers} at a time" if together else ""
    terminal.say(
        f"{len(left)} cells to run: up {terminal.size(up)}, down {terminal.size(down)}, about "
        f"{terminal.duration(max(busy) + alone)}, an estimate from one measured step that leaves out start-up{how}"
    )


def _conclude(recorder: Recorder, summary: Summary, label: str = "") -> Summary:
    if summary["status"] == "failed":
        print(f"error: {label}{summary['reason']}", file=sys.stderr)
    elif "rounds" in summary:
        terminal.conclude(recorder.config, summary, label)
    return summary


def _resident(cell: Config) -> str:
    """Equal for cells that share what a process keeps, which are therefore played in a row, and may be in step."""
    parts = [asdict(part) for part in (cell.dataset, cell.model, cell.adapter, cell.partition)]
    return json.dumps([*parts, cell.clients, cell.device, cell.threads, cell.seed])


# ---- whole cells on Ray workers


class SideBySide:
    """Plays cells on so many workers at a time."""

    def __init__(self, recorders: list[Recorder], workers: int, gpus: float) -> None:
        from fedlora.engines import cluster

        self.recorders, self.workers, self.nodes = recorders, workers, cluster.Nodes(gpus)
        self.grows = recorders[0].config.engine.workers is None and recorders[0].config.engine.address is not None
        self.rising: dict[Any, Seat] = {}  # by the reference to where they are, until it is there
        self.idle: list[Seat] = []
        self.waiting: deque[tuple[tuple[int, ...], int]] = deque()  # numbers of cells in step, and attempts left
        self.running: dict[Any, tuple[Seat, tuple[int, ...], int]] = {}  # by the reference to the summaries
        self.ended: dict[int, Summary] = {}

    def run(self, in_step: list[tuple[int, ...]]) -> dict[int, Summary]:
        """Summaries of the cells with these numbers; on Ctrl-C every cell of the sweep that has not ended is interrupted."""
        import ray

        from fedlora.engines.pool import start_ray

        numbers = [number for numbers in in_step for number in numbers]
        terminal.say(f"{len(numbers)} of {len(self.recorders)} cells side by side, {self.workers} at a time")
        start_ray(replace(self.recorders[numbers[0]].config.engine, workers=self.workers))
        self.waiting.extend((together, ATTEMPTS) for together in in_step)
        with CtrlC() as ctrl_c:
            try:
                with terminal.Cells({number: self.recorders[number] for number in numbers}) as shown, terminal.notes():
                    self._play(shown, ctrl_c)
            except KeyboardInterrupt:
                ctrl_c.later = True
                self._stop()
            finally:
                for seat in [*self.idle, *self.rising.values(), *(seat for seat, _, _ in self.running.values())]:
                    ray.kill(seat.player)
        return self.ended

    def _play(self, shown: terminal.Cells, ctrl_c: CtrlC) -> None:
        import ray

        for _ in range(self.workers):
            self._seat()
        while self.waiting or self.running:
            while self.waiting and self.idle:
                self._begin(self.idle.pop(), *self.waiting.popleft())
            if self.grows and self.waiting and not self.rising:  # what a cluster says of its room lags behind
                for _ in range(min(self.nodes.free(), len(self.waiting))):
                    self._seat()
            for task in ray.wait([*self.running, *self.rising], timeout=1.0)[0]:
                self._rise(task) if task in self.rising else self._end(task)
            shown.update(self.ended, [number for _, numbers, _ in self.running.values() for number in numbers])
            ctrl_c.check()

    def _seat(self) -> None:
        """Take on a player; it is idle when it is up."""
        from fedlora.engines import cluster

        driver = cluster.driver(self.recorders[0].config)
        player = self.nodes.place(cluster.actor(Player, self.nodes.gpus)).remote(sys.argv, driver)
        seat = Seat(player, player.place.remote())
        self.rising[seat.place] = seat

    def _rise(self, task: Any) -> None:
        """A player is up, or its node has left or lacks something; raises RunError where no node can play."""
        import ray

        from fedlora.engines import cluster

        seat = self.rising.pop(task)
        try:
            ray.get(task)
            self.idle.append(seat)
        except ray.exceptions.RayActorError as error:
            if error.actor_init_failed and cluster.joined is None:
                raise cluster.cause(error) from error
            if error.actor_init_failed:
                self.nodes.bar(seat.player, error)
                if not (self.idle or self.running):
                    self.nodes.check()
            self._seat()

    def _label(self, number: int) -> str:
        return f"cell {number + 1} of {len(self.recorders)}: "

    def _begin(self, seat: Seat, numbers: tuple[int, ...], attempts: int) -> None:
        for number in numbers:
            terminal.say(self._label(number) + self.recorders[number].folder.name)
        from fedlora.engines import cluster

        configs = [self.recorders[number].config for number in numbers]
        playing = seat.player.play.remote(
            [config.to_json() for config in configs], [cluster.sources(config) for config in configs]
        )
        self.running[playing] = seat, numbers, attempts

    def _end(self, task: Any) -> None:
        """Take in the summaries of cells, or begin them again where their worker died."""
        import ray

        seat, numbers, attempts = self.running.pop(task)
        try:
            summaries = ray.get(task)
            self.idle.append(seat)
        except ray.exceptions.RayError:
            ray.kill(seat.player)
            self._seat()
            if attempts > 1:
                for number in numbers:
                    terminal.say(self._label(number) + "its worker died, so it is run again")
                self.waiting.appendleft((numbers, attempts - 1))
                return
            summaries = [{"status": "failed", "reason": f"its worker died {ATTEMPTS} times (out of memory?)"}] * len(numbers)
        for number, summary in zip(numbers, summaries, strict=True):
            for note in summary.get("notes", ()):
                terminal.say(f"{self._label(number)}note: {note}")
            self.ended[number] = _conclude(self.recorders[number], summary, self._label(number))

    def _stop(self) -> None:
        """Ctrl-C for every cell that runs, and the time to save what there is; one whose process is not up has nothing."""
        import ray

        terminal.say(f"{interrupt.reason()}; the cells that run save what there is")
        for seat, _, _ in self.running.values():
            with contextlib.suppress(ray.exceptions.RayError, ProcessLookupError):  # it has died meanwhile
                seat.stop(interrupt.received)
        deadline = time.monotonic() + GRACE
        for task, (_, numbers, _) in list(self.running.items()):
            with contextlib.suppress(ray.exceptions.RayError):  # died, or took too long
                summaries = ray.get(task, timeout=max(0.0, deadline - time.monotonic()))
                for number, summary in zip(numbers, summaries, strict=True):
                    self.ended[number] = _conclude(self.recorders[number], summary, self._label(number))
        self.ended |= {number: INTERRUPTED for number in range(len(self.recorders)) if number not in self.ended}

"""One experiment, from its configuration to its results folder."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid

from clients import cost
from fedlora import engines, interrupt
from fedlora.app import guard, naming, plan, ranks, report, terminal
from fedlora.app.assembly import make_strategy
from fedlora.app.checkpoint import RELEASED, Checkpoint, Checkpoints, Released
from fedlora.app.folder import ADAPTER, CHECKPOINTS, CURVES, MERGED, PRIVACY, ROUNDS, SUMS
from fedlora.app.records import Recorder
from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState
from fedlora.check import RunError
from fedlora.compute import workbench
from fedlora.compute.evaluate import evaluate
from fedlora.compute.workbench import Workbench
from fedlora.config import Config
from fedlora.data import labels
from fedlora.engines.local import LocalGrid
from fedlora.interrupt import CtrlC
from fedlora.models import export
from fedlora.privacy import ledger
from fedlora.secure import Sets
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from fedlora.app.guard import Keeper


def run(
    config: Config,
    started: float,
    app: str = engines.CLIENT_APP,
    engine_name: str | None = None,
) -> dict[str, Any]:
    """Run the experiment and return its summary, which is also in the results folder.

    `started` is the `time.perf_counter()` from which seconds count; `engine_name` runs it on another engine than the one of
    its settings, which the folder keeps. A run that has finished before is not run again, one that was broken off goes on.
    Raises ConfigError before any training, and RunError where the run cannot go on; Ctrl-C ends it with what there is.
    """
    recorder = Recorder(config)
    if not recorder.finished:
        with recorder.claim():
            if not recorder.finished:  # as it may be, by whoever had it until now
                return play(recorder, started, app, engine_name)
    terminal.finished(recorder.folder)
    return recorder.summary()


def play(
    recorder: Recorder,
    started: float,
    app: str = engines.CLIENT_APP,
    engine_name: str | None = None,
    engine: engines.Engine | None = None,
    strategy: LoRAStrategy | None = None,
) -> dict[str, Any]:
    """What `run` does in a folder that is claimed and not finished; `engine` and `strategy` are such that exist already."""
    config = recorder.config
    checkpoints = Checkpoints(recorder.folder / CHECKPOINTS, config.checkpoint)
    last = None if config.overwrite else checkpoints.newest(recorder.folder / ROUNDS, terminal.say)
    if last:
        recorder.refuse_others(last.settings)
        terminal.say(f"{recorder.folder} was broken off; it goes on after round {last.round} of {config.rounds}")
    strategy = strategy or make_strategy(config)
    shown = terminal.Rounds(config)
    placed = replace(config, engine=replace(config.engine, name=engine_name or config.engine.name))
    engine = engine or engines.make(placed, app, lambda count: shown.replied(strategy.report, count))
    try:
        bench = workbench.refreshed(config)
        state = initial_state(bench, strategy)
        counted = recorder.folder / PRIVACY
        before = counted if config.fresh_noise and not config.overwrite else None
        keeper = guard.make(bench, recorder.spend, before)
        released = None if keeper is None else books(recorder, keeper, last)
        terminal.announce(config, plan.derive(bench, strategy, state, keeper))
        recorder.begin(last.history[0] if last else 0)
        if released:
            released.write()
        course = Course(bench, strategy, keeper, recorder, checkpoints, shown, state, started, released)
        if last:
            course.go_on(last)
        with course.ctrl_c:
            with shown, terminal.notes() as notes:
                outcome = engines.attempt(engine, course.drive)
            said = [*labels.notes(bench.dataset), *notes.values()]
            outcome |= {"resumed": checkpoints.resumed, "notes": said}
            try:
                course.ctrl_c.later = outcome["status"] == "interrupted"
                return conclude(bench, course.state, recorder, outcome)
            except KeyboardInterrupt:  # as what had finished was saved, which the same command does again
                course.ctrl_c.later = True
                return conclude(bench, course.state, recorder, outcome | interrupt.outcome())
    finally:
        engine.close()


def foretell(config: Config, strategy: LoRAStrategy | None = None, show: bool = True) -> tuple[plan.Estimate, str]:
    """What the run would come to, and its σ and ε, or a dash; printed where it is to be shown. Nothing is trained."""
    bench, strategy = workbench.refreshed(config), strategy or make_strategy(config)
    state = initial_state(bench, strategy)
    keeper, estimate = guard.make(bench), plan.estimate(bench, strategy, state)
    if show:
        terminal.announce(config, [])
        rows = plan.derive(bench, strategy, state, keeper) + plan.expense(bench, strategy, state, estimate)
        terminal.table(naming.name_of(config), ["", "", "because"], [list(row) for row in rows])
    return estimate, "–" if keeper is None else " = ".join(keeper.derivation()[:2])


class Course:
    """The rounds of one run, from the first one or from where it was broken off, and what is written after each."""

    def __init__(
        self,
        bench: Workbench,
        strategy: LoRAStrategy,
        keeper: Keeper | None,
        recorder: Recorder,
        checkpoints: Checkpoints,
        shown: terminal.Rounds,
        state: ServerState,
        started: float,
        released: Released | None = None,
    ) -> None:
        self.bench, self.strategy, self.guard, self.started = bench, strategy, keeper, started
        self.recorder, self.checkpoints, self.shown = recorder, checkpoints, shown
        self.state = self.initial = state  # after the newest line of the records, and before the first round
        self.last: Checkpoint | None = None
        self.done = 0  # rounds before those of this process
        self.clients: dict[int, RecordDict] | None = None  # what they keep, where the grid has it
        self.cohorts: dict[str, int] = {}  # clients that share a pass, by what they train; empty: not settled
        self.ctrl_c = CtrlC()
        if keeper is not None:
            strategy.admit, strategy.release, strategy.draw = keeper.admit, keeper.release, keeper.draw or strategy.draw
        if released is not None:
            strategy.settled = released.note

    def go_on(self, last: Checkpoint) -> None:
        """Stand where the run stood at this checkpoint; its seconds go on from those of the newest line."""
        self.last, self.done, self.state, self.cohorts = last, last.round, last.state, last.cohorts
        rows = report.read_rounds(self.recorder.folder)
        self.started -= rows[-1]["seconds"]
        self.shown.went_on(rows)

    def drive(self, grid: Grid) -> None:
        """The rounds that are left, in Flower's own loop."""
        self._meet(grid)
        self._settle(grid)
        config, state = self.bench.config, self.state
        arrays = messages.pack(state.adapters, state.dense, correction=state.base_correction)
        if self.last:
            self.strategy.go_on(self.done, state, self.initial.adapters)
        job = ConfigRecord({messages.EXPERIMENT: (config.for_devices if config.deploy else config).to_json()})
        if config.deploy:
            job[messages.BASE], job[messages.LINEAGE] = self.bench.model.digest, self.checkpoints.lineage
            if self.strategy.sum_of:
                self.strategy.sum_of.remember(Sets(self.recorder.folder / SUMS), self.checkpoints.lineage)
        noisy = ConfigRecord(dict(job))
        if self.guard is not None and self.guard.noise_multipliers:
            noisy[messages.NOISE] = self.guard.noise_multipliers
        self.strategy.start(
            grid=grid,
            initial_arrays=arrays,
            num_rounds=config.rounds - self.done,
            timeout=config.round_timeout,
            train_config=noisy,
            evaluate_config=job,
            evaluate_fn=self.after_round,
        )

    def after_round(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this before the first round and after each, and counts from where it begins."""
        if self.last and number == 0:
            return None
        config, strategy, round = self.bench.config, self.strategy, self.done + number
        state = strategy.state or self.state
        row = {"round": round} | (strategy.report.as_row(self.started) if strategy.report else {})
        row |= self.guard.spent() if self.guard else {}
        measured: dict[str, float] = {}
        due = round % config.evaluate.every == 0 or round == config.rounds
        if due and not strategy.personal and len(self.bench.dataset.test):
            measured = measure(self.bench, arrays)
        row |= measured | {"seconds": time.perf_counter() - self.started}
        with self.ctrl_c.held():
            self.recorder.round(row)
            self.state = state
            if self.clients is not None and self.checkpoints.due(round, config.rounds):
                memory, lines = self.guard.memory() if self.guard else {}, self.recorder.history()
                settled = Checkpoint(round, self.recorder.identity, state, self.clients, memory, lines, cohorts=self.cohorts)
                self.checkpoints.save(settled)
            self.shown.finished(row)
        self.ctrl_c.check()
        return MetricRecord(dict(measured)) if measured else None

    def _meet(self, grid: Grid) -> None:
        """Give clients back what they kept; where they would lose it with this run, one cannot be gone on with.

        Devices keep it themselves, round by round.
        """
        lost = self.strategy.remembered and not self.bench.config.deploy
        self.clients = getattr(grid, "states", None if lost else {})
        what = f"strategy={self.strategy.name} with compression.up={self.bench.config.compression.up} leaves on its clients"
        if self.clients is None and self.last:
            raise RunError(f"this engine cannot give back what {what}; go on with engine=inline or engine=ray")
        if self.clients is None and self.checkpoints.config.every:
            terminal.say(f"no checkpoints are written: this engine does not give out what {what}")
        if self.clients is not None and self.last:
            self.clients.update(self.last.clients)

    def _settle(self, grid: Grid) -> None:
        """Let so many clients share a pass as when the run began: bits depend on it, on whichever machine it goes on."""
        config, wanted = self.bench.config, engines.cohort(self.bench.config)
        if config.deploy or not isinstance(grid, LocalGrid) or not grid.settles:
            return
        if not self.cohorts:
            trained = {self.strategy.trained(round) for round in (1, 2)}
            self.cohorts = {each: wanted or cost.cohort_size(self.bench, each, config.cohort_size) for each in trained}
        sizes = set(self.cohorts.values())
        if wanted is not None and sizes != {wanted}:
            began = " or ".join(map(str, sorted(sizes)))
            terminal.say(f"engine.cohort={wanted}: {began} clients share a pass, as when this run began, so that its bits stay")
        grid.cohort = 1 if sizes == {1} else self.cohorts


def books(recorder: Recorder, keeper: Keeper, last: Checkpoint | None) -> Released | None:
    """What was released before this process, where a round that is taken again has the noise that it had; else None.

    The keeper stands where it stood at `last`. Raises ConfigError where what was spent or released cannot be known.
    """
    config, counted = recorder.config, recorder.folder / PRIVACY
    begun = counted.exists()
    if last:
        if last.round and not begun:
            raise ledger.unknown(f"the privacy ledger {counted} is missing")
        keeper.go_on(last.guard)
    if config.fresh_noise:
        return None
    released = Released(recorder.folder / CHECKPOINTS / RELEASED)
    if not config.overwrite:
        idle = begun and type(keeper.ledger).load(counted) == keeper.ledger
        if said := released.recall(last, begun, idle):
            terminal.say(said)
    return released


def initial_state(bench: Workbench, strategy: LoRAStrategy) -> ServerState:
    """What the server begins with: B = 0, A by the strategy's `init`, the head as it was loaded; R = 0 where it is trained.

    The strategy gets to know how the factors begin, and the clients' ranks, which may depend on the model.
    """
    mixes = "R" in strategy.trains
    adapters = bench.model.initial(strategy.init, bench.config.seed, mixes=mixes)
    strategy.initial = adapters
    strategy.ranks = ranks.of_clients(bench.config, adapters, strategy.trains)
    dense = {} if strategy.personal else dict(bench.model.initial_head)
    if mixes:
        dense |= {messages.rotation(layer): np.zeros((pair.rank,) * 2, np.float32) for layer, pair in adapters.items()}
    return ServerState(adapters, dense, scale=bench.model.scale)


def measure(bench: Workbench, arrays: ArrayRecord) -> dict[str, float]:
    """The merged model on the central test set, and the seconds that took."""
    began = time.perf_counter()
    bench.model.write(*messages.unpack(arrays))
    measured = evaluate(bench.model, bench.test, np.arange(len(bench.test)), bench.config.evaluate.batch_size)
    return measured | {"seconds_evaluate": time.perf_counter() - began}


def conclude(bench: Workbench, state: ServerState, recorder: Recorder, outcome: dict[str, Any]) -> dict[str, Any]:
    """Save the merged adapter and the plot, write the summary last, and return it; raises RunError for a failed run.

    A run that was interrupted has no plot.
    """
    bench.model.write(state.adapters, bench.model.initial_head | state.dense, state.base_correction)  # no client's own head
    rows = report.read_rounds(recorder.folder)
    summary = report.summarise(bench.config, rows) | {"classes": list(labels.counts(bench.dataset).items())} | outcome
    try:
        recorder.save(ADAPTER, partial(export.adapter, bench.model))
        if bench.config.save_merged:
            recorder.save(MERGED, partial(export.merged, bench.model))
        if report.tested(rows) and outcome["status"] != "interrupted":  # which is to end soon; a plot takes seconds
            recorder.save(CURVES, lambda path: report.draw_curves(path, rows, summary))
        recorder.close(summary)
    except RunError as error:  # a full disk, most likely: the first reason is the one to tell
        raise RunError(outcome.get("reason", str(error))) from error
    if outcome["status"] == "failed":
        raise RunError(outcome["reason"])
    return summary

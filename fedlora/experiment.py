"""One experiment, from its configuration to its results folder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from fedlora import engines, messages, plan, ranks, report, terminal, workbench
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.evaluate import evaluate
from fedlora.interrupt import CtrlC
from fedlora.messages import ServerState
from fedlora.records import ADAPTER, CURVES, MERGED, PRIVACY, Recorder
from fedlora.server import make_strategy
from fedlora.workbench import Workbench
from strategies import LoRAStrategy


def run(
    config: Config,
    started: float,
    app: str = engines.CLIENT_APP,
    engine_name: str | None = None,
    engine: engines.Engine | None = None,
) -> dict[str, Any]:
    """Run the experiment and return its summary, which is also in the results folder.

    `started` is the `time.perf_counter()` from which seconds count; `engine_name` runs it on another engine than the one of
    its settings, which the folder keeps; `engine` is one that exists already. A run that has finished before is not run again.
    Raises ConfigError before any training, and RunError where the run cannot go on; Ctrl-C ends it with what there is.
    """
    recorder = Recorder(config)
    if recorder.finished:
        terminal.say(f"{recorder.folder} is finished, with these settings; overwrite=true runs it again")
        return recorder.summary()
    recorder.claim()
    strategy = make_strategy(config)
    shown = terminal.Rounds(config)
    placed = replace(config, engine=replace(config.engine, name=engine_name or config.engine.name))
    engine = engine or engines.make(placed, app, lambda count: shown.replied(strategy.report, count))
    try:
        bench = workbench.build(config)
        state = initial_state(bench, strategy)
        guard = plan.guard(bench, lambda ledger: recorder.save(PRIVACY, ledger.save))
        if guard is not None:
            strategy.admit, strategy.release = guard.admit, guard.release
        terminal.announce(config, plan.derive(bench, strategy, state, guard))
        recorder.begin()

        ctrl_c = CtrlC()
        reached = deque([state], maxlen=1)  # the state that the newest line of the records tells of

        def after_round(round: int, arrays: ArrayRecord) -> MetricRecord | None:
            """Flower calls this before the first round and after each."""
            row = {"round": round} | (strategy.report.as_row(started) if strategy.report else {})
            row |= guard.spent() if guard else {}
            measured: dict[str, float] = {}
            due = round % config.evaluate.every == 0 or round == config.rounds
            if due and not strategy.personal and len(bench.dataset.test):
                measured = measure(bench, arrays)
            row |= measured | {"seconds": time.perf_counter() - started}
            recorder.round(row)
            reached.append(strategy.state or state)
            shown.finished(row)
            ctrl_c.check()
            return MetricRecord(dict(measured)) if measured else None

        job = ConfigRecord({messages.EXPERIMENT: config.to_json()})
        noisy = ConfigRecord(dict(job))
        if guard is not None and guard.noise_multipliers:
            noisy[messages.NOISE] = guard.noise_multipliers
        rounds = partial(
            strategy.start,
            initial_arrays=messages.pack(state.adapters, state.dense, correction=state.base_correction),
            num_rounds=config.rounds,
            timeout=config.round_timeout,
            train_config=noisy,
            evaluate_config=job,
            evaluate_fn=after_round,
        )
        with shown, ctrl_c, terminal.notes() as notes:
            outcome = attempt(engine, rounds)
    finally:
        engine.close()
    return conclude(bench, reached[-1], recorder, outcome, list(notes.values()))


def initial_state(bench: Workbench, strategy: LoRAStrategy) -> ServerState:
    """What the server begins with: B = 0, A by the strategy's `init`, the head as it was loaded; R = 0 where it is trained.

    The strategy gets to know it, for what it can foretell of messages, and the clients' ranks, which may depend on the model.
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


def attempt(engine: engines.Engine, rounds: Callable[[Grid], object]) -> dict[str, str]:
    """Run the rounds on the engine's grid and say how that ended: finished, interrupted or failed, with the reason."""
    try:
        engine.run(rounds)
    except KeyboardInterrupt:
        return {"status": "interrupted", "reason": "stopped by Ctrl-C"}
    except RunError as error:
        return {"status": "failed", "reason": str(error)}
    return {"status": "finished"}


def conclude(
    bench: Workbench, state: ServerState, recorder: Recorder, outcome: dict[str, str], notes: list[str]
) -> dict[str, Any]:
    """Save the merged adapter and the plot, write the summary last, and return it; raises RunError for a failed run."""
    bench.model.write(state.adapters, state.dense, state.base_correction)
    rows = report.read_rounds(recorder.folder)
    summary = report.summarise(bench.config, rows) | outcome | {"notes": notes}
    try:
        recorder.save(ADAPTER, bench.model.save)
        if bench.config.save_merged:
            recorder.save(MERGED, bench.model.save_merged)
        if report.tested(rows):
            recorder.save(CURVES, lambda path: report.draw_curves(path, rows, summary))
        recorder.close(summary)
    except RunError as error:  # a full disk, most likely: the first reason is the one to tell
        raise RunError(outcome.get("reason", str(error))) from error
    if outcome["status"] == "failed":
        raise RunError(outcome["reason"])
    return summary

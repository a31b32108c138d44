"""How many clients should share a pass: measured on this machine, for this model and these batches, once.

Fusing saves what a pass costs however little goes through it; past some size, more rows only leave the processor's caches.
The size is measured before the first round and kept (`cohort.json` in the cache folder), so that the same command has the
same cohorts, and with them the same bits, the next time on the same machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from clients.cohort import Member, train_together
from clients.task import Task, simulated_key
from clients.train import perform
from fedlora import cache
from fedlora.arrays.messages import rotation
from fedlora.compute.workbench import Workbench

STEPS = 2  # of a client, in each measurement
SIZES = (1, 2, 4, 8, 16, 32, 64)
GAIN = 0.97  # a larger cohort must take less than this share of the time a client takes in a smaller one
PATIENCE = 5.0  # seconds of measuring after which no larger size is tried
COPIES = 2**28  # entries that all examples' copies of their factors may have in a pass: 1 GiB, and as much of gradients


def cohort_size(bench: Workbench, trains: str, clients: int, wanted: int | None = None) -> int:
    """How many of a round's `clients` share a pass: as many as are `wanted`, or else as many as is best here.

    1 where the model refuses it (`Rows.refusal`). The best are at most so many that there is a cohort for each core. So it
    depends on the clients and on the machine, and not on how many workers there are.
    """
    if bench.rows.refusal:
        return 1
    if wanted is not None:
        return wanted
    key = _key(bench, trains)
    if key not in (kept := cache.read("cohort")):
        kept = {key: float(measure(bench, trains))}
        cache.add("cohort", kept)
    return min(max(1, int(kept[key])), math.ceil(clients / (os.cpu_count() or 1)))


def group(tasks: Sequence[Task], size: int) -> list[list[int]]:
    """The tasks, by their places, in cohorts of `size` alike ones: the longest first, so that no worker ends with one."""
    work = [task.steps * min(task.settings.batch_size, len(task.indices)) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda place: (-work[place], place))
    return [order[start : start + size] for start in range(0, len(order), size)]


def measure(bench: Workbench, trains: str) -> int:
    """The size with the fewest seconds a client and step, the sizes tried in rising order until two in a row gain nothing.

    One may have had a busy moment of the machine.
    """
    entries = bench.config.train.batch_size * sum(pair.A.size + pair.B.size for pair in bench.model.adapters().values())
    began, best, least, worse = time.perf_counter(), 1, np.inf, 0
    for size in SIZES:
        if size * entries > COPIES:
            break
        try:
            each = seconds(bench, trains, size)
        except torch.OutOfMemoryError:
            break
        if each <= GAIN * least:
            best, least, worse = size, each, 0
        else:
            worse += 1
        if worse == 2 or time.perf_counter() - began > PATIENCE:
            break
    return best


def seconds(bench: Workbench, trains: str, size: int) -> float:
    """Seconds of one local step of the median client, in a cohort of `size` like it; private if the run is.

    The resident model's factors are overwritten.
    """
    model, examples, config = bench.model, bench.train, bench.config
    indices, _ = bench.examples_of(int(np.argsort(bench.counts, kind="stable")[config.clients // 2]))
    mechanism = key = None
    if config.privacy.name == "record":
        from clients.private import Mechanism

        mechanism = Mechanism(1.0, config.privacy.clip)
        key = simulated_key((config.seed, 0, 0), "", mechanism)  # what is drawn goes nowhere
    settings = dataclasses.replace(config.train, steps=STEPS, epochs=None)
    tasks = [Task(indices, settings, trains, (1, 1), (config.seed, k, 0), mechanism, key) for k in range(size)]
    start, dense = model.initial("kaiming", config.seed), model.initial_head
    if "R" in trains:
        dense = dense | {rotation(layer): np.zeros((pair.rank, pair.rank), np.float32) for layer, pair in start.items()}
    if size == 1:
        model.write(start, dense)
        return quickest(lambda: perform(tasks[0], model, examples)) / STEPS
    members = [Member(task, start, dense, model.scale) for task in tasks]
    return quickest(lambda: train_together(bench.rows, examples, members)) / (STEPS * size)


def quickest(run: Callable[[], object]) -> float:
    """Seconds of the quickest of three runs, after one that warms up.

    Where one thread does all the work they are its own, so that whatever else runs here does not count.
    """
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.thread_time
    run()
    taken = []
    for _ in range(3):
        began = clock()
        run()
        taken.append(clock() - began)
    return min(taken)


def _key(bench: Workbench, trains: str) -> str:
    """Everything that the answer depends on."""
    config = bench.config
    machine = [platform.node(), platform.machine(), torch.__version__, torch.get_num_threads(), str(bench.model.device)]
    settings = [dataclasses.asdict(group) for group in (config.model, config.adapter)]
    batch = [config.train.batch_size, config.train.physical_batch_size, config.privacy.name == "record"]
    return json.dumps([machine, settings, config.dataset.path, config.engine.prefix_cache, trains, batch], sort_keys=True)

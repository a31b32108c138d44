"""The main job in private, against Flower's `run_simulation` with Opacus' PrivacyEngine at every client.

    python -m benchmarks.main_job [--rounds 30] [--repeats 2]

50 clients, 10 a round, 10 steps of DP-SGD (σ = 1, C = 1) at each, FedSVD. All sides run `experiment.run`, so that the
strategy, the cohorts, the split, the central test in every round and the records are the same, on one worker a core with
one thread. They differ in the engine and the ClientApp: fedlora's own, or Flower's simulation with
`benchmarks.flower_client`, which builds model, adapters, loader and PrivacyEngine for every message, as Flower's Opacus
example does; that the example also asks for ε at every client, after every training, is a row of its own.

Start is from the birth of the process to the first messages, and to the end of round 1, by when all workers have built
what they keep; the job is all later rounds. The cohort size is measured before, once.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

from benchmarks import jobs, sides
from clients import cost
from fedlora.app import experiment, report
from fedlora.app.records import Recorder
from fedlora.compute import workbench
from fedlora.config import Config, EngineConfig, PrivacyConfig
from fedlora.engines import CLIENT_APP
from fedlora.validate import checked

SIDES = {
    "fedlora, engine=ray": ("ray", CLIENT_APP),
    "fedlora, engine=inline": ("inline", CLIENT_APP),
    "Flower and Opacus": ("flower", "benchmarks.flower_client:app"),
    "the same, ε at every client": ("flower", "benchmarks.flower_client:example"),
}
SPANS = {"first": "start to first messages", "start": "start to end of round 1", "job": "all later rounds"}


def main() -> None:
    """Print seconds of the spans and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=[*SIDES, "warm"])
    arguments = parser.parse_args()
    if arguments.side:
        return side(arguments.side, arguments.rounds)
    sides.heading(f"main job, private, {arguments.rounds} rounds", arguments.repeats, "flwr", "ray", "opacus", "peft")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with sides.cache():
        sides.in_process("benchmarks.main_job", "--side", "warm")
        for _ in range(arguments.repeats):
            for name, taken in runs.items():
                taken.append(sides.in_process("benchmarks.main_job", "--side", name, "--rounds", str(arguments.rounds)))
    for span, title in SPANS.items():
        sides.table({name: [run[span] for run in taken] for name, taken in runs.items()}, f"s, {title}")
    for name, taken in runs.items():
        print(f"{name:32}accuracy {taken[-1]['accuracy']:.3f}, loss {taken[-1]['loss']:.3f}, {taken[-1]['drops']:g} drops")


def side(name: str, rounds: int) -> None:
    """One run, or, for `warm`, the measurement of the cohort size alone; answers with the spans."""
    with sides.answer() as given, tempfile.TemporaryDirectory() as results:
        if name == "warm":
            bench = workbench.build(job("inline", rounds, results))
            given["cohort"] = cost.cohort_size(bench, "B", bench.config.cohort_size)
            return
        engine, app = SIDES[name]
        config = job(engine, rounds, results)
        summary = experiment.run(config, sides.born(), app)
        rows = report.read_rounds(Recorder(config).folder)
        given |= {key: summary[key] for key in ("accuracy", "loss", "drops")}
        given |= {"first": rows[1]["started"], "start": rows[1]["seconds"], "job": rows[-1]["seconds"] - rows[1]["seconds"]}


def job(engine: str, rounds: int, results: str) -> Config:
    """The main job with privacy at every record; σ is given, as in Flower's example, so that nobody calibrates."""
    config = jobs.vit(rounds=rounds, results=results, privacy=PrivacyConfig("record", noise_multiplier=1.0))
    return checked(replace(config, engine=EngineConfig(engine)))


if __name__ == "__main__":
    main()

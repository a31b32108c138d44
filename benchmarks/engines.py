"""The main job on `engine=ray` against Flower's own simulation, `engine=flower`, as ratios taken in one run.

    python -m benchmarks.engines [--repeats 3] [-- setting=value …]

Each repetition runs `python run.py` once per engine, one after the other, in processes of their own and on the same number
of workers. Three spans are taken from the run's own records: start to the end of round 1 (engines differ in when a worker
builds its model, and by then all have), training in the later rounds (sum of `seconds_train`), and the whole run. The two
must end with the same accuracy and loss to the last bit, or the comparison is void and this exits with status 1. Clients are
played one by one on both (`engine.cohort=1`), so this is the engines alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import sides

ENGINES = ("ray", "flower")


def measure(engine: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds of the three spans of one run, and its accuracy and loss."""
    command = [
        sys.executable,
        str(sides.ROOT / "run.py"),
        f"engine={engine}",
        f"results={folder}",
        f"name={engine}",
        "overwrite=true",
    ]
    if engine != "flower":
        command.append("engine.cohort=1")  # Flower plays client by client, and cohorts round otherwise
    subprocess.run([*command, *overrides], check=True, capture_output=True, cwd=sides.ROOT)
    summary = json.loads((folder / engine / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / engine / "rounds.jsonl").read_text().splitlines()]
    return {
        "start to end of round 1": rows[1]["seconds"],
        "training, later rounds": sum(row["seconds_train"] for row in rows[2:]),
        "whole run": summary["seconds"],
        "accuracy": summary["accuracy"],
        "loss": summary["loss"],
    }


def main() -> int:
    """Print seconds and ratios, median and range over the repetitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for engine in ENGINES:
                runs[engine].append(measure(engine, Path(folder), arguments.overrides))
    ends = {(run["accuracy"], run["loss"]) for engine in ENGINES for run in runs[engine]}
    job = " ".join(arguments.overrides) or "main job"
    sides.heading(job, arguments.repeats, "flwr", "ray")
    for span in ("start to end of round 1", "training, later rounds", "whole run"):
        sides.table({engine: [run[span] for run in taken] for engine, taken in runs.items()}, f"s, {span}", places=1)
    print(f"the same accuracy and loss in all runs: {'yes' if len(ends) == 1 else 'NO'}")
    return 0 if len(ends) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())

"""A sweep whose cells run side by side: the numbers of a run by itself, whatever befalls the cells beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.app import cells, records, terminal
from fedlora.config import Config
from fedlora.engines import cluster, pool
from fedlora.tools import cli
from tests.conftest import ROOT, run_py

FAST = ["-m", "clients=4", "rounds=2", "fraction=null", "train.steps=1", "device=cpu", "engine.workers=2", "name=sweep"]


def numbers(folder: Path) -> dict[str, tuple[bytes, list[dict]]]:
    """Cell → the bytes of its adapter, and its rounds without what a clock says."""
    found = {}
    for file in folder.glob("sweep/*/adapter/adapter_model.safetensors"):
        rows = [json.loads(line) for line in (file.parent.parent / "rounds.jsonl").read_text().splitlines()]
        rows = [{key: value for key, value in row.items() if "seconds" not in key and key != "started"} for row in rows]
        found[file.parent.parent.name] = file.read_bytes(), rows
    return found


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def processes_of(session: int) -> list[str]:
    """Command lines of what still runs in a session of processes."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = status.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append((status.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass  # it has ended
    return found


def test_cells_side_by_side_give_the_numbers_of_inline_past_a_failed_one_and_are_not_run_twice(tmp_path, capsys) -> None:
    swept = [*FAST, "strategy=fedavg,fedsvd", "train.lr=0.1,1e30", "adapter.dropout=0.1", "train.steps=3"]
    inline = [text for text in swept if not text.startswith("engine.workers")]
    first = run_py(*swept, "results=ray", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert first.returncode == 1
    assert "4 of 4 cells side by side, 2 at a time" in first.stdout
    assert len(lines(first.stdout, "cell ")) == 4 + 2 and not lines(first.stdout, "round ")  # four begin, two finish
    assert [line[:17] for line in sorted(lines(first.stderr, "error: "))] == ["error: cell 2 of ", "error: cell 4 of "]
    assert cli.main(ROOT / "configs", [*inline, f"results={tmp_path}/inline", "engine=inline"]) == 1
    there = numbers(tmp_path / "ray")
    assert len(there) == 4 and there == numbers(tmp_path / "inline")
    (cell,) = tmp_path.glob("ray/sweep/fedsvd,train.lr=0.1,*")
    kept = json.loads((cell / "config.json").read_text())
    assert kept["engine"]["name"] == "ray" and kept["engine"]["workers"] == 2
    assert json.loads((cell / "env.json").read_text())["command"][:2] == ["run.py", "-m"]
    assert len((tmp_path / "ray" / "sweep" / "table.csv").read_text().splitlines()) == 1 + 4
    capsys.readouterr()
    assert cli.main(ROOT / "configs", [*inline, f"results={tmp_path}/ray", "engine=inline"]) == 1
    assert capsys.readouterr().out.count("is finished, with these settings") == 2


def test_ctrl_c_saves_every_cell_that_runs_and_leaves_no_process(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *FAST, "seed=1,2,3,4", "rounds=100000", f"results={tmp_path}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len([f for f in tmp_path.rglob("rounds.jsonl") if len(f.read_text()) > 2000]) < 2:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert err == "" and len([line for line in lines(out, "cell ") if "stopped by Ctrl-C after round" in line]) == 2
    summaries = [json.loads(file.read_text()) for file in tmp_path.rglob("summary.json")]
    assert [summary["status"] for summary in summaries] == ["interrupted", "interrupted"]
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and processes_of(process.pid):
        time.sleep(0.1)
    assert processes_of(process.pid) == []


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Ray workers that see the variable by which a cell's process is told to die."""
    monkeypatch.setenv("FEDLORA_TEST_MARK", str(tmp_path / "mark"))
    pool.shutdown()
    yield
    pool.shutdown()


class Mortal(cells.Player):
    """A player that dies in its first cell of seed 1, and in every one of seed 2."""

    def play(self, cells: list[str], sources=None):
        (cell,), mark = cells, Path(os.environ["FEDLORA_TEST_MARK"])
        if '"seed": 2' in cell or not mark.exists():
            if '"seed": 1' in cell:
                mark.touch()
            os._exit(1)
        return super().play(cells, sources)


def test_a_cell_whose_worker_dies_is_run_once_more_and_then_failed(small, capsys, monkeypatch, workers) -> None:
    swept = [small(seed=seed, engine__name="ray", engine__workers=2) for seed in (1, 2)]
    monkeypatch.setattr(cells, "Player", Mortal)
    assert [summary["status"] for _, summary in cells.run(swept)] == ["finished", "failed"]
    printed = capsys.readouterr()
    assert sorted(line for line in lines(printed.out, "cell ") if "died" in line) == [
        f"cell {number} of 2: its worker died, so it is run again" for number in (1, 2)
    ]
    assert printed.err == "error: cell 2 of 2: its worker died 2 times (out of memory?)\n"
    assert [records.Recorder(cell).finished for cell in swept] == [True, False]


def test_as_many_cells_as_fill_the_workers_run_side_by_side_and_none_otherwise(small) -> None:
    def chosen(*settings: dict) -> list[tuple[int, ...]]:
        usual = {"engine__name": "ray", "engine__workers": 2}
        return cells.side_by_side([records.Recorder(small(**usual | own)) for own in settings])[0]

    assert chosen({"seed": 1}, {"seed": 2}, {"seed": 3}) == [(0,), (1,)]
    alike = {"seed": 2}, {"seed": 1}, {"seed": 2, "rounds": 1}, {"seed": 1, "rounds": 1}, {"seed": 1, "train__lr": 0.1}
    assert chosen(*alike) == [(1,), (3,), (4,), (0,)]
    assert chosen(*({"engine__share": 2} | each for each in alike)) == [(1, 3), (4,)]
    assert chosen(*({"engine__share": 9} | each for each in alike)) == [(1, 3, 4), (0, 2)]
    assert chosen({"seed": 1}) == []
    assert chosen({"seed": 1, "engine__workers": 1}, {"seed": 2, "engine__workers": 1}) == []
    assert chosen({"seed": 1}, {"seed": 2, "engine__workers": 3}) == []
    assert chosen({"seed": 1, "engine__name": "inline"}, {"seed": 2, "engine__name": "inline"}) == []


def test_a_looser_bound_is_noted_once_a_run_in_one_line(capsys) -> None:
    import warnings

    from fedlora.privacy import LooserBound

    with terminal.notes() as said:
        warnings.warn("ε is looser", LooserBound, stacklevel=1)
        warnings.warn("ε is looser still", LooserBound, stacklevel=1)
    assert list(said.values()) == ["ε is looser"]
    assert capsys.readouterr() == ("note: ε is looser\n", "")


def test_the_plan_of_a_sweep_has_a_row_a_cell_and_totals(tmp_path, capsys) -> None:
    swept = ["privacy=record", "privacy.epsilon=3,inf", "privacy.accountant=rdp", "seed=1,2", "train.lr=0.1", "plan=true"]
    assert cli.main(ROOT / "configs", [*FAST, *swept, f"results={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    rows = lines(printed, "fedsvd,seed=")  # what is swept comes first
    assert len(rows) == 4 and sum("σ = 0 " in row and "privacy.epsilon=inf," in row for row in rows) == 2
    assert all(
        "139.3 kB  163.8 kB" in row for row in rows
    )  # 4 clients × 2 rounds × 8 arrays of 2,176 bytes, and of 384 more down
    total = lines(printed, "4 cells to run: up 557.1 kB, down 655.4 kB, about ")
    assert len(total) == 1 and "4 of them side by side, 2 at a time" in total[0]
    assert not list(tmp_path.iterdir())


def test_cells_in_step_share_passes_and_have_their_own_numbers(small, player, monkeypatch) -> None:
    """Alone and in step: three rounds of strategies, σ and learning rates that differ, and one that ends early."""
    from clients import cohort

    own = [
        {"strategy": {"name": "fedsvd"}, "rounds": 3},
        {"strategy": {"name": "fedavg"}, "rounds": 3, "train__lr": 0.1},
        {"strategy": {"name": "ffa_lora"}, "rounds": 1, "privacy__name": "record", "privacy__noise_multiplier": 0.5},
        {"strategy": {"name": "ffa_lora"}, "rounds": 3, "privacy__name": "record", "privacy__noise_multiplier": 1.5},
    ]
    settings = {"engine__cohort": "16", "evaluate__holdout": 0.3}
    alone = [cells.attempt(small(**settings | each, name=f"alone{k}"), 0.0) for k, each in enumerate(own)]
    sizes, real = [], cohort.train_together
    monkeypatch.setattr(
        cohort, "train_together", lambda rows, examples, members: sizes.append(len(members)) or real(rows, examples, members)
    )
    together = [small(**settings | each, name=f"together{k}").to_json() for k, each in enumerate(own)]
    summaries = player.play(together)
    assert sizes == [16, 12, 12]  # four clients a round each
    for ours, theirs in zip(summaries, alone, strict=True):
        assert ours["status"] == theirs["status"] == "finished"
        assert all(ours[key] == theirs[key] for key in ("bytes_up", "bytes_down", "epsilon"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_cell_in_step_that_fails_leaves_the_others_alone_and_ctrl_c_ends_them_all(small, player, monkeypatch) -> None:
    good, bad = small(name="good"), small(name="bad", train__lr=1e30, train__steps=3)
    assert [summary["status"] for summary in player.play([bad.to_json(), good.to_json()])] == ["failed", "finished"]
    long = [small(name=f"long{k}", rounds=10_000).to_json() for k in range(3)]
    monkeypatch.setattr(
        terminal.Rounds, "finished", lambda self, row: row["round"] == 2 and os.kill(os.getpid(), signal.SIGUSR1)
    )
    ended = player.play(long)
    assert [summary["status"] for summary in ended] == ["interrupted"] * 3
    assert all(summary["rounds"] in (1, 2) for summary in ended)
    assert player.play(long) == [cells.INTERRUPTED] * 3


@pytest.fixture
def player():
    """A player in this process."""
    before = signal.getsignal(signal.SIGUSR1)
    yield cells.Player(sys.argv, cluster.driver(Config()))
    signal.signal(signal.SIGUSR1, before)

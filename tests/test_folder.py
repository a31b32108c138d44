"""What stands in a results folder is taken for what it should be, or named in one sentence; nothing else happens to it."""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fedlora import disk
from fedlora.app import experiment, folder, records, report
from fedlora.app.checkpoint import Checkpoints
from fedlora.check import ConfigError, RunError
from tests.fuzz import files as fuzz
from tests.test_checkpoint import broken_off, lines, outcome, quick  # noqa: F401  # a fixture

USER = {"privacy__name": "user", "privacy__noise_multiplier": 1.0, "privacy__sampling": "fixed"}
RECORD = {"privacy__name": "record", "privacy__noise_multiplier": 1.0}


# ---- one process a folder


def test_a_lock_file_that_is_deleted_lets_nobody_in(quick) -> None:  # noqa: F811
    config = quick(name="mine")
    first, second = records.Recorder(config), records.Recorder(config)
    with first.claim():
        (first.folder / folder.LOCK).unlink()
        with pytest.raises(ConfigError, match=r"name=mine: another process runs in"):
            second.claim(patience=0.0)
        first.still_ours()  # tidying up does a run no harm
    second.claim().__exit__()


def test_where_folders_cannot_be_locked_a_deleted_lock_file_ends_the_run(quick, monkeypatch) -> None:  # noqa: F811
    """As on NFS, which refuses it."""
    flock = disk.fcntl.flock

    def of_files(descriptor: int, operation: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(disk.fcntl, "flock", of_files)
    recorder = records.Recorder(quick(name="mine"))
    with recorder.claim():
        recorder.begin()
        recorder.round({"round": 0})
        (recorder.folder / folder.LOCK).unlink()
        with pytest.raises(RunError, match=r"mine or its .lock was removed or replaced .* the run stops here"):
            recorder.round({"round": 1})
        with pytest.raises(RunError, match="removed or replaced"):
            recorder.spend(None)
    assert len(lines(recorder.folder)) == 1


def test_a_folder_that_was_replaced_ends_the_run(quick, tmp_path) -> None:  # noqa: F811
    recorder = records.Recorder(quick(name="mine"))
    with recorder.claim():
        recorder.begin()
        recorder.folder.rename(tmp_path / "moved")
        recorder.folder.mkdir()
        with pytest.raises(RunError, match="removed or replaced"):
            recorder.round({"round": 0})


# ---- names that stand for something else


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "rounds.jsonl", "summary.json", "privacy.json", ".lock"])
@pytest.mark.parametrize("kind", ["dangling", "to a file", "to a folder", "another kind", "a pipe"])
def test_links_and_other_kinds_are_named(quick, tmp_path, name, kind) -> None:  # noqa: F811
    config = quick(name="mine")
    path = Path(config.results) / "mine" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder").mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind != "another kind":
        path.symlink_to(tmp_path / {"dangling": "nowhere", "to a file": "file", "to a folder": "folder"}[kind])
    elif name in folder.FOLDERS:
        path.write_text("")
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match=rf"mine/{name} is .* and not a (file|folder); move it away"):
        experiment.run(config, 0.0)
    assert sorted(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(quick, monkeypatch) -> None:  # noqa: F811
    config = quick(name="mine")
    where = broken_off(config, monkeypatch, 1) / "checkpoints"
    whole = {path: path.read_bytes() for path in where.iterdir()}
    path_open = Path.open

    def refused(self, *arguments, **keywords):
        if self.name.startswith("round-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return path_open(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        with pytest.raises(ConfigError, match=r"cannot use .*round-00001.safetensors \(Permission denied\)"):
            experiment.run(config, 0.0)
    assert {path: path.read_bytes() for path in where.iterdir()} == whole
    (where / "round-00009.safetensors").write_bytes(whole[where / "round-00001.safetensors"])  # of another round than it says
    said: list[str] = []
    found = Checkpoints(where, config.checkpoint).newest(where.parent / "rounds.jsonl", said.append)
    assert found is not None and found.round == 1 and "it is that of round 1" in said[0]


@pytest.mark.parametrize("name", ["checkpoints", "adapter", ""])
def test_a_folder_that_cannot_be_written_is_named(quick, monkeypatch, name) -> None:  # noqa: F811
    config = quick(name="mine")
    where = Path(config.results) / "mine" / name
    where.mkdir(parents=True)
    temporary = records.tempfile.TemporaryFile

    def read_only(dir):
        if Path(dir) == where:
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary(dir=dir)

    monkeypatch.setattr(records.tempfile, "TemporaryFile", read_only)
    with pytest.raises(ConfigError, match=rf"cannot write .*{where.name} \(Read-only file system\); choose another folder"):
        experiment.run(config, 0.0)


def test_a_million_checkpoints_are_refused(quick) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"checkpoint.keep=1000000000 is out of range; it must be at most 1,000"):
        quick(checkpoint__keep=10**9)


# ---- what noise was used with


def lose(path: Path, how: str) -> None:
    """Take away a file, or a part of what it says."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-5], "another": content.replace(b"1", b"2", 1), "empty": b""}[how])


@pytest.mark.parametrize("private", [USER, RECORD], ids=["user", "record"])
@pytest.mark.parametrize("how", ["missing", "cut", "another", "empty"])
def test_releases_that_are_forgotten_are_known_again_or_the_run_is_refused(quick, monkeypatch, capsys, private, how) -> None:  # noqa: F811
    config = quick(name="mine", **private)
    where = broken_off(config, monkeypatch, 2)  # and so between two rounds: no more was released than the checkpoint has
    lose(where / "checkpoints" / "released.json", how)
    with monkeypatch.context() as patched:
        patched.setattr(records.Recorder, "round", _stop)  # after the round was released
        with pytest.raises(SystemExit):
            experiment.run(config, 0.0)
    assert "released.json is made again from the checkpoint" in capsys.readouterr().out
    released = where / "checkpoints" / "released.json"
    assert sorted(disk.unsealed(released.read_bytes())) == ["2", "3"]
    before = released.read_bytes()
    lose(released, how)
    with pytest.raises(ConfigError, match=r"cannot read .*released.json .* restore the file, or begin anew .* overwrite=true"):
        experiment.run(config, 0.0)
    released.write_bytes(before)
    shutil.copytree(where, where.with_name("copy"))
    experiment.run(quick(name="copy", **private), 0.0)
    lose(released, how)
    assert experiment.run(quick(name="mine", seed=5, overwrite=True, **private), 0.0)["status"] == "finished"


def _stop(*_: object) -> None:
    raise SystemExit(9)


@pytest.mark.parametrize("private", [USER, RECORD], ids=["user", "record"])
def test_a_lost_ledger_and_a_round_before_those_that_are_known_are_refused(quick, monkeypatch, private) -> None:  # noqa: F811
    config = quick(name="mine", **private)
    where = broken_off(config, monkeypatch, 2)
    spent = (where / "privacy.json").read_bytes()
    (where / "privacy.json").unlink()
    with pytest.raises(ConfigError, match=r"the privacy ledger .*privacy.json is missing"):
        experiment.run(config, 0.0)
    (where / "privacy.json").write_bytes(spent)
    (where / "checkpoints" / "released.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", _stop)
        with pytest.raises(SystemExit):
            experiment.run(config, 0.0)
    for path in (where / "checkpoints").glob("round-*"):
        path.unlink()
    with pytest.raises(RunError, match=r"round 1 came out nobody knows how before"):
        experiment.run(config, 0.0)


# ---- damage


def test_the_numbers_of_a_summary_are_those_that_are_checked(quick) -> None:  # noqa: F811
    summary = report.summarise(quick(), [])
    assert {*folder.ALWAYS, *folder.PERHAPS} | {"strategy", "seed", "privacy"} == set(summary)


def test_damaged_files_give_sentences(tmp_path) -> None:
    """No traceback, whatever is damaged in the folder of a run or a device. `python -m tests.fuzz files` damages many more."""
    with fuzz.part(tmp_path) as case:
        came = sum((case(seed) for seed in range(400)), Counter())
    assert came["a ConfigError (device)"] > 10 and came["said in the log (device)"] > 10
    assert all(came[f"{what} ({run})"] > 10 for what in ("a ConfigError", "used as it is") for run in fuzz.RUNS)

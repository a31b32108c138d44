"""What comes home in a server's log may have been written by anybody: bounded, named, and a sentence for everything else."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest

from fedlora.app import report
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.deploy import courier, launch
from fedlora.deploy.courier import Receiver, Sender


class Home:
    """A receiver, and what it was given."""

    def __init__(self, most_bytes: int = courier.MOST_BYTES) -> None:
        self.said: list[str] = []
        self.rows: list[str] = []
        self.files: dict[str, bytes] = {}
        self.receiver = Receiver(self.said.append, self.rows.append, self.files.__setitem__, most_bytes)
        self.taken = 0

    def take(self, line: str) -> None:
        """A line under our mark, with the next number."""
        assert self.receiver.take(f"fedlora {self.taken} {line}\n")
        self.taken += 1


def part(name: str, content: bytes) -> str:
    return f"part {name} {base64.b64encode(content).decode()}"


def test_a_line_for_people_has_no_control_codes_and_an_end(tmp_path) -> None:
    home = Home()
    home.take("say \x1b]0;owned\x07\x1b[2Jround 1/5\x9b31m\u202e  σ = 1.1 × ε – │")
    home.take("say " + "x" * 10**6)
    assert home.said[0] == "?]0;owned??[2Jround 1/5?31m?  σ = 1.1 × ε – │"
    assert len(home.said[1]) == courier.LONGEST_TEXT + 1
    lines: list[str] = []
    usual = "round 5/5  accuracy 0.886  loss 0.414  up 348.2 kB  down 409.6 kB  9.6 s"
    print(usual, file=Sender(tmp_path, lines.append))
    other = Home()
    assert other.receiver.take(lines[0]) and other.said == [usual]  # what fedlora says comes as it was


@pytest.mark.parametrize("piece", ["", "A", "!!!!", "AAAA AAAA", "AAA\u00e9", "=" * 8], ids=repr)
def test_a_piece_that_is_no_base64_is_one_sentence(piece: str) -> None:
    home = Home()
    if piece == "":
        home.take("part summary.json ")  # nothing is a piece of nothing
        home.take("end summary.json")
        assert home.files == {"summary.json": b""}
        return
    with pytest.raises(RunError, match="that is no base64"):
        home.take(f"part summary.json {piece}")


def test_files_are_bounded_piece_by_piece_and_in_all() -> None:
    with pytest.raises(RunError, match="48000 bytes in a piece"):
        Home().take(part("summary.json", bytes(courier.PIECE + 1)))
    home = Home(most_bytes=10)
    home.take(part("summary.json", bytes(6)))
    home.take("end summary.json")
    with pytest.raises(RunError, match="10 in all"):
        home.take(part("adapter/a.json", bytes(6)))


@pytest.mark.parametrize("kind", ["part", "end"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "rounds.jsonl", "flower-run", ".lock", "checkpoints/1", "adapter", "adapter/", "adapter//x.json",
        "adapter/../x.json", "../x", "/etc/x", "adapter/.hidden.json", "adapter/x.py", "adapter/pytorch_model.bin",
        "adapter/x.json\x1b[2J", "adapter/" + "a" * 300 + ".json", "adapter/a/b/c/d/e.json", "",
    ],
)  # fmt: skip
def test_only_files_that_a_run_has_are_taken(kind: str, name: str) -> None:
    home = Home()
    with pytest.raises(RunError, match="none of a run's or lies outside the results folder") as raised:
        home.take(f"{kind} {name} AAAA")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 250 and not home.files


@pytest.mark.parametrize("name", ["summary.json", "privacy.json", "curves.png", "adapter/adapter_model.safetensors",
                                  "merged/model-00001-of-00002.safetensors", "merged/sentencepiece.bpe.model"])  # fmt: skip
def test_files_of_a_run_are_taken(name: str) -> None:
    home = Home()
    home.take(part(name, b"abc"))
    home.take(part(name, b"def"))
    home.take(f"end {name} ")
    assert home.files == {name: b"abcdef"}


def test_a_round_has_an_end_and_a_line_a_known_kind(monkeypatch) -> None:
    with pytest.raises(RunError, match="unknown kind run"):
        Home().take("run rm")
    monkeypatch.setattr(courier, "LONGEST_LINE", 100)
    with pytest.raises(RunError, match="a round of 100 characters or more"):
        Home().take("row " + "1" * 100)
    assert not Home().receiver.take(f"fedlora {'9' * 5000} say hello\n")  # a number that Python would not even read


@pytest.mark.parametrize("line", ["[1]", "1", "{", "NaN", '{"a":' * 10**5, "9" * 5000, "\x1b"])
def test_a_round_is_a_json_object(line: str) -> None:
    with pytest.raises(RunError, match="the server sent records that cannot be read") as raised:
        launch._object(line)
    assert str(raised.value).isprintable()


def test_a_summary_is_one_that_a_run_leaves_and_its_texts_are_clean() -> None:
    with pytest.raises(RunError, match="a summary that no run leaves"):
        launch._summary(b"{}")
    with pytest.raises(RunError, match="a summary that no run leaves"):
        launch._summary(b'{"status": "finished"}')
    assert launch._summary(b'{"status": "failed", "reason": "\\u001b[2Jno\\nclients"}')["reason"] == "?[2Jno clients"
    config = dataclasses.replace(Config(), deploy="here")
    whole = report.summarise(config, []) | {"status": "interrupted", "notes": ["\x1b[31mred"]}
    taken = launch._summary(json.dumps(whole).encode())
    assert taken["notes"] == ["?[31mred"] and taken["reason"] == ""

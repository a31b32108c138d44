"""A device's own books: the ledger's lines, the keys of its noise, and who may read its folder."""

import errno
import json
import math
import os
import shutil
from dataclasses import replace

import pytest

from fedlora.check import ConfigError
from fedlora.deploy import account as accounts
from fedlora.deploy.account import LEDGER, SECRET, TRAIN, Account, Permit, Work
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason, Refused

LIMITS = Limits(epsilon=8.0, delta=1e-5, clip=1.0, steps=100)
STEPS = (0.9, 0.2, 4)  # σ, q, steps of a round
ROUND = Work(TRAIN, "x", 1, {"run": 7})


def silent(line: str) -> None:
    pass


@pytest.fixture
def account(tmp_path):
    return Account(tmp_path / "state", LIMITS, silent)


def reopened(account: Account, limits: Limits = LIMITS, say=silent) -> Account:
    account.close()
    return Account(account.folder, limits, say)


# ---- the ledger


def test_a_round_is_on_disk_before_it_begins_and_is_found_again(account) -> None:
    permit = account.admit(ROUND, *STEPS)
    (line,) = (account.folder / LEDGER).read_text().splitlines()
    row = json.loads(line)
    assert len(row.pop("draw")) == 32 and row == {
        "number": 1, "noise_multiplier": 0.9, "sampling_rate": 0.2, "steps": 4, "kind": "train", "round": 1, "run": 7
    }  # fmt: skip
    assert permit.work == ROUND and account.in_force is permit
    spent = account.spent
    again = reopened(account)
    assert again.spent == spent > 0 and again.in_force is None
    again.admit(ROUND, *STEPS)  # the same round again counts again
    assert [row["number"] for row in again.rows] == [1, 2] and again.spent > spent


def test_a_budget_is_counted_by_the_owners_own_adjacency(account) -> None:
    account.admit(ROUND, *STEPS)
    spent = account.spent
    stricter = reopened(account, replace(LIMITS, adjacency="replace"))
    assert stricter.spent == stricter.ledger.epsilon(0, 1e-5, adjacency="replace") > spent
    assert stricter.after(*STEPS) > stricter.spent
    with pytest.raises(Refused, match="above its own budget of 5"):
        reopened(stricter, replace(LIMITS, adjacency="replace", epsilon=5.0)).admit(ROUND, *STEPS)


def test_nothing_is_written_of_a_round_above_the_budget(account) -> None:
    account.admit(ROUND, *STEPS)
    with pytest.raises(Refused, match=r"100 steps with σ = 0.5 would take it above its own budget of 8") as refused:
        account.admit(ROUND, 0.5, 1.0, 100)
    assert refused.value.reason is Reason.SPENT and account.in_force is None and len(account.rows) == 1


def test_a_budget_is_for_all_runs_together(account) -> None:
    rounds = 0
    with pytest.raises(Refused, match="budget"):
        while True:
            account = reopened(account)
            account.admit(ROUND, *STEPS)
            rounds += 1
    assert 0 < account.spent <= 8 < account.after(*STEPS) and rounds == len(account.rows)


def test_work_without_privacy_is_in_the_ledger_too_and_leaves_no_budget(account) -> None:
    with pytest.raises(Refused, match="budget"):
        account.admit(ROUND, None, 1.0, 1)
    open_handed = reopened(account, Limits(math.inf, 1e-5, 1.0, 100))
    assert open_handed.admit(ROUND, None, 1.0, 1).key is None
    bound = reopened(open_handed)
    assert math.isinf(bound.spent)
    with pytest.raises(Refused, match="has spent ε = inf"):
        bound.admit(ROUND, *STEPS)


def test_a_line_that_a_kill_cut_off_is_removed_and_a_damaged_one_refused(account) -> None:
    account.admit(ROUND, *STEPS)
    path = account.folder / LEDGER
    path.write_text(path.read_text() + '{"number": 2, "noise')
    account = reopened(account)
    assert len(account.rows) == 1
    account.admit(ROUND, *STEPS)
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2]
    for damage in ('{"number": 1}\n', path.read_text().splitlines()[1] + "\n", "x\n", "[]\n"):
        path.write_text(damage)
        with pytest.raises(ConfigError, match="damaged in line 1"):
            reopened(account)


@pytest.mark.parametrize("when", ["write", "flush", "and the half line stays"])
def test_a_full_disk_leaves_no_half_line(account, monkeypatch, when) -> None:
    """A disk that is nearly full takes the first bytes of a line. The next one must not be glued to them."""
    account.admit(ROUND, *STEPS)
    path, real = account.folder / LEDGER, os.pwrite
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(opened: int, content: bytes, at: int) -> int:
        return real(opened, content[:9], at) if at == len(before) else full()

    with monkeypatch.context() as patched:
        patched.setattr(os, *(("fsync", full) if when == "flush" else ("pwrite", half)))
        if when.startswith("and"):
            patched.setattr(os, "ftruncate", full)
        with pytest.raises((Refused, OSError), match="No space left"):
            account.admit(ROUND, *STEPS)
    assert (path.read_bytes() == before) or when.startswith("and")
    assert account.in_force is None and len(account.rows) == 1
    account.admit(ROUND, *STEPS)
    assert [row["number"] for row in reopened(account).rows] == [1, 2]


def test_a_ledger_that_another_program_changed_meanwhile_stops_the_device(account) -> None:
    account.admit(ROUND, *STEPS)
    path = account.folder / LEDGER
    whole = path.read_bytes()
    for other in (b"", whole + whole):
        path.write_bytes(other)
        with pytest.raises(Refused, match="another program has changed it") as refused:
            account.admit(ROUND, *STEPS)
        assert refused.value.reason is Reason.FAILED and path.read_bytes() == other


def test_two_clients_cannot_share_a_ledger(account) -> None:
    with pytest.raises(ConfigError, match="used by another fedlora-client"):
        Account(account.folder, LIMITS, silent)


# ---- the keys


def test_no_key_comes_twice_whatever_is_copied_or_restored(account, tmp_path) -> None:
    """Two trainings with one key have the same noise, and their difference has none."""
    keys = [account.admit(ROUND, *STEPS).key]
    shutil.copytree(account.folder, tmp_path / "clone")
    keys.append(account.admit(ROUND, *STEPS).key)
    clone = Account(tmp_path / "clone", LIMITS, silent)  # restored, or on another machine: the same secret, the same line
    assert clone.secret == account.secret and len(clone.rows) == 1
    keys.append(clone.admit(ROUND, *STEPS).key)
    assert len(set(keys)) == 3 and {len(key) for key in keys} == {32}


def test_a_key_needs_the_secret_the_fresh_bytes_and_the_number(tmp_path) -> None:
    def key(folder: str, fresh: int, rounds: int = 1, secret: int = 1) -> bytes:
        (tmp_path / folder).mkdir(mode=0o700)
        (tmp_path / folder / SECRET).write_text(f"{secret:064x}\n")
        account = Account(tmp_path / folder, LIMITS, silent, random=lambda n: bytes([fresh]) * n)
        return [account.admit(ROUND, *STEPS).key for _ in range(rounds)][-1]

    one = key("a", fresh=1)
    assert one == key("b", fresh=1)
    assert len({one, key("c", fresh=2), key("d", fresh=1, rounds=2), key("e", fresh=1, secret=2)}) == 4


def test_the_ledger_names_a_draw_and_nothing_on_disk_tells_its_key(account) -> None:
    permits = [account.admit(ROUND, *STEPS) for _ in range(2)]
    files = b"".join(path.read_bytes() for path in account.folder.iterdir())
    assert len({row["draw"] for row in account.rows}) == 2
    for permit in permits:
        assert permit.key.hex().encode() not in files and permit.key not in files and permit.key.hex() not in repr(permit)


def test_the_secret_is_made_once_by_the_operating_system(account, tmp_path) -> None:
    other = Account(tmp_path / "other", LIMITS, silent)
    assert account.secret != other.secret and len(account.secret) == 64
    assert reopened(account).secret == account.secret
    (other.folder / SECRET).write_text("short")
    with pytest.raises(ConfigError, match="32 bytes"):
        reopened(other)


def test_only_the_newest_permit_is_in_force(account) -> None:
    old, new = account.admit(ROUND, *STEPS), account.admit(ROUND, *STEPS)
    account.ensure(new)
    for permit in (old, Permit(ROUND, bytes(32)), Permit(new.work, new.key)):
        with pytest.raises(Refused):
            account.ensure(permit)


# ---- the folder


def test_what_others_could_read_is_shut_when_a_device_starts_and_named(account) -> None:
    account.admit(ROUND, *STEPS)
    (account.folder / "kept" / "x").mkdir(parents=True)
    (account.folder / "kept" / "x" / "round-00001").write_bytes(b"")
    open_to_all = [account.folder, account.folder / SECRET, account.folder / LEDGER, account.folder / "kept/x/round-00001"]
    for path in open_to_all:
        path.chmod(0o755 if path.is_dir() else 0o644)
    said: list[str] = []
    account = reopened(account, say=said.append)
    assert all(any(line.startswith(f"{path} could be read") for line in said) for path in open_to_all)
    modes = {path: path.stat().st_mode & 0o777 for path in (account.folder, *account.folder.rglob("*"))}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
    said.clear()
    reopened(account, say=said.append)
    assert not said


def test_a_new_folder_is_its_owners_alone_whatever_the_umask(tmp_path) -> None:
    before = os.umask(0)
    try:
        account = Account(tmp_path / "a" / "state", LIMITS, silent)
        account.admit(ROUND, *STEPS)
    finally:
        os.umask(before)
    assert account.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in account.folder.iterdir()} == {0o600}


def test_a_folder_with_something_of_another_users_is_refused(account, monkeypatch) -> None:
    account.close()
    monkeypatch.setattr(accounts.folders.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        Account(account.folder, LIMITS, silent)


def test_the_bytes_of_the_operating_system_are_the_default() -> None:
    assert Account.__init__.__defaults__[1:] == (os.urandom,)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 20_000,
        b"\xff",
        b'{"number": 1, "noise_multiplier": 1%s, "sampling_rate": 0.1, "steps": 3}' % (b"0" * 400),
        b'{"number": 1, "noise_multiplier": 1, "sampling_rate": 0.1, "steps": 3%s}' % (b"0" * 400),
    ],
)
def test_a_line_that_no_parser_or_float_can_hold_is_named(account, line) -> None:
    account.close()
    (account.folder / LEDGER).write_bytes(line + b"\n")
    with pytest.raises(ConfigError, match=r"ledger.jsonl is damaged in line 1 \(.*so what was spent is unknown"):
        reopened(account)


def test_a_secret_that_is_no_text_is_named(account) -> None:
    account.close()
    (account.folder / SECRET).write_bytes(b"\x91" * 64)
    with pytest.raises(ConfigError, match="is not a secret of 32 bytes in hexadecimal"):
        reopened(account)

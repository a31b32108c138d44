"""Secure sums under attack: who spoils one is named, what can be summed still is, and no sum is silently wrong."""

from __future__ import annotations

import os

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clients import asked
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.check import ConfigError, RunError
from fedlora.secure import ACTIONS, Participant, Sets, Terms, crypto, secure_sum
from fedlora.secure.forms import Arrays
from fedlora.secure.participant import digests_of, possession
from tests.test_secure import SIZE, Cohort, cohort, drawn, injected, joined, listed, plain, refused, saved, shared

CLIENTS, TERMS = list(range(5)), Terms(3, 1.0, 9)
Answers = dict[int, Arrays]


def at(action: str, change) -> object:
    """Tampering with the answers to one action."""

    def tamper(asked: str, answers: Answers) -> Answers:
        if asked == action:
            change(answers)
        return answers

    return tamper


def check(members: Cohort, clients: list[int]) -> None:
    """The sum is that of these clients, in bits."""
    total = members.sum(CLIENTS, TERMS)
    expected, examples = plain(members, clients, len(members.answers["advertise"]), TERMS)
    assert (total.clients, total.examples, total.sum.tobytes()) == (clients, examples, expected.tobytes())


# ---- wrong shares, wrong vectors


@pytest.mark.parametrize("row", range(5))
def test_one_flipped_bit_in_an_unmask_share_is_found_named_and_does_without(row) -> None:
    """Rows 0 to 3 are shares of own masks, row 4 of the mask key of the client that dropped out."""

    def flip(answers: Answers) -> None:
        answers[1]["shares"][row, 7] ^= 16

    members = cohort(CLIENTS, TERMS, silent={"mask": {4}}, tamper=at("unmask", flip))
    check(members, [0, 1, 2, 3])
    assert members.drops == {1: f"the share of client {row}'s secret that it gives is not the one it was dealt"}


def test_where_no_share_is_to_spare_the_sum_ends_and_says_whose_masks_stay() -> None:
    def flip(answers: Answers) -> None:
        answers[1]["shares"][2, 0] ^= 1

    terms = Terms(5, 1.0, 9)
    members = cohort(CLIENTS, terms, tamper=at("unmask", flip))
    with pytest.raises(RunError, match=r"masks of client 2 cannot be removed .*: 4 clients gave a right share .* threshold=5"):
        members.sum(CLIENTS, terms)
    assert members.drops.keys() == {1}


def test_random_words_as_a_masked_vector_end_the_sum() -> None:
    def spoil(answers: Answers) -> None:
        answers[2]["masked"] = np.random.default_rng(0).integers(0, 2**32, SIZE + 1, np.uint32)

    with pytest.raises(RunError, match="one of clients 0, 1, 2, 3, 4 sent what is no masked vector, and the masks hide which"):
        cohort(CLIENTS, TERMS, tamper=at("mask", spoil)).sum(CLIENTS, TERMS)


def test_a_coordinate_beyond_the_bound_ends_the_sum_though_the_examples_are_right() -> None:
    def spoil(answers: Answers) -> None:
        answers[2]["masked"][3] ^= 2**31

    members = Cohort(dict.fromkeys(CLIENTS, np.zeros(SIZE)), dict.fromkeys(CLIENTS, 1), tamper=at("mask", spoil))
    with pytest.raises(
        RunError, match=r"at most 45 in a coordinate, and its clients have said 5 and promised 5: one of clients"
    ):
        members.sum(CLIENTS, TERMS)


def test_examples_other_than_a_client_has_said_end_the_sum() -> None:
    members = cohort(CLIENTS, TERMS)
    said = members.examples
    members.examples = said | {3: said[3] % 9 + 1}
    with pytest.raises(RunError, match="its clients have said"):
        secure_sum(members.ask, said, SIZE, TERMS)


# ---- who deals what nobody can use


def test_shares_that_do_not_open_cost_only_who_dealt_them() -> None:
    def spoil(answers: Answers) -> None:
        if 3 in answers:
            answers[3]["shares"][:] = 7

    members = cohort(CLIENTS, TERMS, tamper=at("share", spoil))
    check(members, [0, 1, 2, 4])
    assert members.drops == {3: "the shares that it dealt do not open"} and not members.refusals


def test_a_single_share_that_does_not_open_costs_nobody() -> None:
    def spoil(answers: Answers) -> None:
        answers[3]["shares"][1, 20] ^= 1

    members = cohort(CLIENTS, TERMS, tamper=at("share", spoil))
    check(members, CLIENTS)
    assert members.drops == {} and len(members.requests) == len(ACTIONS)


def test_who_says_of_all_shares_that_they_do_not_open_evicts_nobody() -> None:
    def slander(answers: Answers) -> None:
        answers[0]["opened"][:] = 0

    members = cohort(CLIENTS, TERMS, tamper=at("mask", slander))
    check(members, CLIENTS)
    assert members.drops == {}


def test_shares_of_no_secret_are_laid_at_the_door_of_who_dealt_them() -> None:
    """Client 2 deals shares of two secrets, with right digests: each by itself is fine, together they fit no commitment."""

    def deal(answers: Answers) -> None:
        for receiver in CLIENTS:
            both = os.urandom(32)
            key = crypto.agree(drawn(injected(1), 2)[1], crypto.public_key(drawn(injected(1), receiver)[1]), "sealed share")
            answers[2]["shares"][receiver] = np.frombuffer(crypto.seal(key, both, f"2 to {receiver}".encode()), np.uint8)
            answers[2]["digests"][receiver] = digests_of(2, receiver, both)

    for silent in ({}, {"mask": {2}}):
        members = cohort(CLIENTS, TERMS, random=injected(1), silent=silent, tamper=at("share", deal))
        with pytest.raises(
            RunError, match=r"the masks of client 2 cannot be removed .* do not fit its keys; leave this client out"
        ):
            members.sum(CLIENTS, TERMS)


# ---- keys


def test_a_copied_key_costs_the_copier_not_the_one_it_copied() -> None:
    for rows in ([0], [1], [2], [0, 1], [0, 1, 2]):

        def copy(answers: Answers, rows: list[int] = rows) -> None:
            answers[4]["keys"][rows] = answers[1]["keys"][rows]
            answers[4]["proof"] = answers[1]["proof"]

        members = cohort(CLIENTS, TERMS, tamper=at("advertise", copy))
        total = members.sum(CLIENTS, TERMS)
        assert total.clients == [0, 1, 2, 3]
        assert members.drops == {4: "it does not hold the keys that it sent, or no sum can use them"}


@pytest.mark.parametrize(
    "key", [bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f"), b"\xed" + b"\xff" * 31, b"\x05" * 32]
)  # fmt: skip
def test_a_key_of_low_order_or_without_its_owner_costs_its_client(key) -> None:
    for row in range(3):

        def weaken(answers: Answers, row: int = row) -> None:
            answers[0]["keys"][row] = np.frombuffer(key, np.uint8)

        members = cohort(CLIENTS, TERMS, tamper=at("advertise", weaken))
        assert members.sum(CLIENTS, TERMS).clients == [1, 2, 3, 4] and members.drops.keys() == {0}


def test_two_clients_of_the_same_secrets_are_both_left_out() -> None:
    """As two clones of one machine would be: each could read what the other is sent."""
    same = injected(3)
    members = cohort(CLIENTS, TERMS, random=lambda client: same(min(client, 3)))
    total = members.sum(CLIENTS, TERMS)
    assert total.clients == [0, 1, 2] and members.drops.keys() == {3, 4}
    assert "another client holds a key of its own too" in members.drops[3]


def test_possession_is_shown_for_one_client_and_key_only() -> None:
    mine, challenge = os.urandom(16), os.urandom(16)
    shown = possession(mine, crypto.public_key(challenge), 7)
    assert shown == possession(challenge, crypto.public_key(mine), 7)
    assert shown != possession(mine, crypto.public_key(challenge), 8)
    assert shown != possession(mine, crypto.public_key(os.urandom(16)), 7)


# ---- combining


@given(st.integers(2, 9), st.data())
@settings(max_examples=30, deadline=None)
def test_combining_is_that_of_pycryptodome_for_shares_and_for_any_bytes(threshold, data) -> None:
    count = data.draw(st.integers(threshold, 2 * threshold))
    places = data.draw(st.permutations(range(count)))[:threshold]
    secret = data.draw(st.binary(min_size=16, max_size=16))
    dealt = crypto.split(secret, threshold, count)
    assert crypto.combine(places, [dealt[place] for place in places]) == secret
    shares = [data.draw(st.binary(min_size=16, max_size=16)) for _ in places]
    assert crypto.combine(places, shares) == Shamir.combine([(p + 1, s) for p, s in zip(places, shares, strict=True)], False)


def test_combining_refuses_a_place_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        crypto.combine([1, 1], [bytes(16)] * 2)


# ---- what comes from outside, in any form

ODD = [
    np.array([]), np.array(0), np.zeros(3), np.full(3, np.nan), np.array([np.inf, 1.0, 1.0]), np.array([2.5, 1.0, 1.0]),
    np.array([3.0, -1.0, 9.0]), np.array([3.0, 1.0, 1e12]), np.zeros((5, 3, 32), np.uint8), np.zeros((3, 32), np.uint8),
    np.full(5, 2**62), np.array([-1, 0, 1, 2, 3]), np.zeros(5, np.int32), np.zeros((5, 60), np.uint8),
    np.ones((5, 2, 16), np.uint8), np.array(["x"] * 5),
    np.array([b"x"]), np.zeros(5, bool), np.zeros(5, complex), np.zeros(SIZE + 1, np.uint32),
    np.zeros(SIZE + 1, ">u4"), np.array(["2020-01-01"], "M8[D]"), np.zeros((5, 0), np.uint8), np.ones(5, np.uint8),
]  # fmt: skip


def mutated(data: st.DataObject, content: Arrays) -> Arrays:
    """The content with one array changed, missing, or something else."""
    changed = {name: array.copy() for name, array in content.items()}
    name = data.draw(st.sampled_from(sorted(changed)))
    kind = data.draw(st.sampled_from(["missing", "odd", "cut", "bytes", "rows", "type"]))
    array = changed[name]
    if kind == "missing":
        del changed[name]
    elif kind == "odd":
        changed[name] = data.draw(st.sampled_from(ODD))
    elif kind == "cut":
        changed[name] = array[: data.draw(st.integers(0, max(0, len(array) - 1)))]
    elif kind == "type":
        changed[name] = array.astype(data.draw(st.sampled_from([np.float32, np.int32, np.uint16, "S3", bool])))
    elif array.size:
        noise = data.draw(st.binary(min_size=array.nbytes, max_size=array.nbytes))
        flat = np.frombuffer(noise, array.dtype).reshape(array.shape).copy()
        changed[name] = flat if kind == "bytes" else np.concatenate([array, flat])
    return changed


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_client_answers_a_mutated_message_as_asked_or_by_one_sentence(data) -> None:
    action = data.draw(st.sampled_from(ACTIONS))
    participants, contents = shared(5)
    first = {"advertise": Participant.join(0), "share": joined(TERMS, 5)[0]}.get(action, participants[0])
    if action == "advertise":
        content = {"terms": TERMS.to_array(), "challenge": np.frombuffer(crypto.public_key(bytes(16)), np.uint8)}
    elif action == "share":
        fresh = joined(TERMS, 5)
        first, content = fresh[0], listed(fresh)
    elif action == "mask":
        content = contents[0]
    else:
        first.mask(contents[0], np.zeros(SIZE), 1)
        content = {"alive": np.array([0, 1, 2, 3]), "dropped": np.array([4])}
    own = (np.zeros(SIZE), 1) if action == "mask" else ()
    before = saved(first.state)
    try:
        getattr(first, action)(mutated(data, content), *own)
    except ValueError as reason:
        assert "\n" not in str(reason) and len(str(reason)) < 200 and saved(first.state) == before


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_answer_is_a_named_drop_or_a_run_error_and_never_another_sum(data) -> None:
    action, client = data.draw(st.sampled_from(ACTIONS)), data.draw(st.sampled_from(CLIENTS))

    def change(answers: Answers) -> None:
        if client in answers:
            extra = {"refused": np.zeros(5, np.uint8), "signature": np.zeros(96, np.uint8)}
            more = {k: extra[k] for k in data.draw(st.sets(st.sampled_from(sorted(extra)), max_size=1))}
            answers[client] = mutated(data, answers[client] | more)

    members = cohort(CLIENTS, TERMS, silent={"mask": {4}}, tamper=at(action, change))
    try:
        total = members.sum(CLIENTS, TERMS)
    except RunError as reason:
        assert "\n" not in str(reason)
        return
    expected, examples = plain(members, total.clients, len(members.requests["share"]), TERMS)
    assert total.examples == examples and total.sum.tobytes() == expected.tobytes()
    assert all("\n" not in why for why in members.drops.values())


def test_too_low_a_threshold_for_what_the_client_asks() -> None:
    one = Participant.join(0, least=3)
    challenge = np.frombuffer(crypto.public_key(bytes(16)), np.uint8)
    refused("this client asks for 3", one, "advertise", {"terms": Terms(2, 1.0).to_array(), "challenge": challenge})
    assert one.advertise({"terms": Terms(3, 1.0).to_array(), "challenge": challenge})["keys"].shape == (3, 32)


def test_products_are_made_of_what_was_asked_for_and_of_nothing_else() -> None:
    """The further messages of the two-message strategies, whose arrays come from outside too."""
    pair = Pair(np.ones((2, 5), np.float32), np.ones((4, 2), np.float32))
    job = ConfigRecord({messages.EXPERIMENT: '{"seed": 0}', messages.ROUND: 1})
    good = {"sketch": {"columns": np.array([3])}, "project": {"x.basis": np.ones((4, 3), np.float32)}}
    bad = [
        np.array([2.0]),
        np.array([0]),
        np.array([-3]),
        np.zeros((0,), np.int64),
        np.ones((3, 4), np.float32),
        np.array(["x"]),
    ]
    bad += [np.ones((4, 3)), np.ones(4, np.float32)]
    for action, content in good.items():
        (name,) = content
        for arrays in ({}, *({name: array} for array in bad)):
            with pytest.raises(ValueError):
                asked.answer(action, 0, RecordDict({"trained": messages.pack({"x": pair}, {})}), job, arrays)
        state = RecordDict({"trained": messages.pack({"x": pair}, {})})
        assert len(asked.answer(action, 0, state, job, content)) == 1


# ---- one set of clients for the same vectors


def test_the_set_is_settled_before_anybody_is_asked_to_unmask() -> None:
    seen: list[tuple[list[int], bool]] = []
    members = cohort(CLIENTS, TERMS, silent={"mask": {4}})
    members.sum(CLIENTS, TERMS, settle=lambda clients: seen.append((clients, "unmask" in members.requests)))
    assert seen == [([0, 1, 2, 3], False)]
    stopped = cohort(CLIENTS, TERMS)

    def no(clients: list[int]) -> None:
        raise RunError("another set")

    with pytest.raises(RunError, match="another set"):
        stopped.sum(CLIENTS, TERMS, settle=no)
    assert "unmask" not in stopped.requests


def test_the_first_set_stays_for_a_round_and_for_a_start(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    Sets(path).note("a", 3, "s", [2, 0, 1])
    for _ in range(2):
        sets = Sets(path)
        assert sets.first("a", 3, "t") == sets.first("b", 9, "s") == [0, 1, 2] and sets.first("a", 4, "t") is None
        sets.note("a", 3, "s", [1, 2, 0])  # the same again
    for experiment, round, start in (("a", 3, "s"), ("a", 3, "t"), ("b", 9, "s")):
        with pytest.raises(
            RunError, match="the same changes were summed for clients 0, 1, 2 before, and a sum for clients 0, 1"
        ):
            sets.note(experiment, round, start, [0, 1])
    sets.note("a", 4, "t", [0, 1])
    assert len(path.read_text().splitlines()) == 2 and path.stat().st_mode & 0o777 == 0o600


ODDER = b"[" * 20_000 + b"\n", b'{"experiment": "a", "round": 1e999, "start": "s", "clients": []}\n'


def test_a_cut_line_of_the_sets_never_counted_and_a_damaged_one_is_refused(tmp_path) -> None:
    path = tmp_path / "sums.jsonl"
    Sets(path).note("a", 1, "s", [0, 1, 2])
    path.write_bytes(path.read_bytes() + b'{"experiment": "a", "rou')
    Sets(path).note("a", 2, "t", [0, 1])
    assert [Sets(path).first("a", round, "") for round in (1, 2)] == [[0, 1, 2], [0, 1]]
    for damage in (b"x\n", b"[]\n", b'{"experiment": 1, "round": "x", "start": 0, "clients": []}\n', b"\xff\n", *ODDER):
        path.write_bytes(damage)
        with pytest.raises(ConfigError, match="is damaged"):
            Sets(path)
    folder = tmp_path / "none" / "sums.jsonl"
    with pytest.raises(RunError, match="no secure sum is unmasked"):
        Sets(folder).note("a", 1, "s", [0])

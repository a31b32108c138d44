"""Secure sums: the sum in bits, whoever drops out when; what clients refuse; what masked vectors look like."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.check import RunError
from fedlora.secure import ACTIONS, FixedPoint, Participant, Terms, Total, crypto, secure_sum
from fedlora.secure.forms import Arrays
from fedlora.secure.participant import own_mask, pair_mask

SIZE = 17
NONE: frozenset[int] = frozenset()


class Cohort:
    """Clients that live as bytes between two messages, and all that the server sends to and gets from them."""

    def __init__(self, vectors: dict[int, np.ndarray], examples: dict[int, int], silent=None, random=None, tamper=None) -> None:
        self.vectors, self.examples = vectors, examples
        self.silent, self.tamper = silent or {}, tamper or (lambda action, answers: answers)
        self.random, self.stored, self.drops = random, {}, {}
        for k in vectors:
            self.join(k)
        self.requests: dict[str, dict[int, Arrays]] = {}
        self.answers: dict[str, dict[int, Arrays]] = {}
        self.refusals: dict[int, str] = {}

    def join(self, client: int) -> None:
        self.stored[client] = saved(Participant.join(client, **({"random": self.random(client)} if self.random else {})).state)

    def sum(self, clients: list[int], terms: Terms, size: int = SIZE, **more) -> Total:
        return secure_sum(self.ask, {k: self.examples[k] for k in clients}, size, terms, self.drops.setdefault, **more)

    def ask(self, action: str, contents: dict[int, Arrays]) -> dict[int, Arrays]:
        self.requests[action], answers = contents, {}
        for client, content in reversed(contents.items()):
            if client in self.silent.get(action, NONE):
                continue
            try:
                answers[client] = self.play(action, client, content)
            except ValueError as reason:
                self.refusals[client] = str(reason)
        self.answers[action] = self.tamper(action, answers)
        return self.answers[action]

    def play(self, action: str, client: int, content: Arrays) -> Arrays:
        if action == "advertise":  # as often as a sum begins
            self.join(client)
        participant = Participant(loaded(self.stored[client]))
        own = (self.vectors[client], self.examples[client]) if action == "mask" else ()
        answer = getattr(participant, action)(loaded(saved(content)), *own)
        self.stored[client] = saved(participant.state)
        return loaded(saved(answer))


def saved(arrays: Arrays) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def loaded(stored: bytes) -> Arrays:
    return dict(np.load(io.BytesIO(stored), allow_pickle=False))


def injected(seed: int) -> Callable[[int], Callable[[int], bytes]]:
    """Known keys, for tests alone: a source of bytes for every client."""

    def of(client: int) -> Callable[[int], bytes]:
        draws = iter(range(100))
        return lambda size: hashlib.sha256(f"{seed}/{client}/{next(draws)}".encode()).digest()[:size]

    return of


def drawn(source: Callable[[int], Callable[[int], bytes]], client: int) -> list[bytes]:
    """The secrets that a client of `source` has: of its mask key, of its share key, of its own mask."""
    draw = source(client)
    return [draw(crypto.SECRET) for _ in range(3)]


def cohort(clients: list[int], terms: Terms, seed: int = 0, size: int = SIZE, **options) -> Cohort:
    rng = np.random.default_rng(seed)
    vectors = {k: rng.uniform(-terms.bound, terms.bound, size) for k in clients}
    return Cohort(vectors, {k: int(rng.integers(1, terms.most_examples + 1)) for k in clients}, **options)


def plain(members: Cohort, clients: list[int], advertised: int, terms: Terms) -> tuple[np.ndarray, int]:
    """The same sum with nothing hidden."""
    code = FixedPoint(terms.bound, terms.most_examples, advertised)
    total = sum(code.encode(members.vectors[k], members.examples[k]).astype(np.int64).astype(object) for k in clients)
    return code.decode(np.array([int(word) % 2**32 for word in total], np.uint32))


def check_sum(members: Cohort, clients: list[int], terms: Terms) -> list[int]:
    """Run it; who is in the sum is who masked, and the sum is the plain one in bits and near the real one."""
    got = members.sum(clients, terms)
    masked = sorted(members.answers["mask"])
    advertised = len(members.answers["advertise"])
    sum_, examples = plain(members, masked, advertised, terms)
    assert got.clients == masked and got.examples == examples == sum(members.examples[k] for k in masked)
    assert got.sum.tobytes() == sum_.tobytes()
    real = sum(members.examples[k] * members.vectors[k] for k in masked)
    step = FixedPoint(terms.bound, terms.most_examples, advertised).step
    assert np.abs(got.sum - real).max() <= (0.5 + 2.0**-20) * step * len(masked)
    return masked


# ---- the code


def test_fixed_point_by_hand() -> None:
    """K = 3, M = 4, bound 2: L = ⌊(2³¹ − 1)/3⌋ = 715827882; one of four examples at x = −1 is L·(1/4)·(−1/2) = −89478485.25."""
    code = FixedPoint(2.0, 4, 3)
    assert (code.levels, code.step) == (715827882, 8 / 715827882)
    words = code.encode(np.array([-1.0, 0.0, 2.0]), 1)
    assert words.dtype == np.uint32 and words.tolist() == [2**32 - 89478485, 0, 178956970, 1]
    sum_, examples = code.decode(words + words)
    assert examples == 2 and sum_.tolist() == [-178956970 * code.step, 0.0, 357913940 * code.step]
    np.testing.assert_allclose(sum_, [-2, 0, 4], rtol=1e-8)


@pytest.mark.parametrize("clients", [2, 3, 7, 10, 1000, 65535])
@pytest.mark.parametrize("bound", [1e-300, 0.1, 1.0, 3e38])
def test_nothing_wraps_at_the_bound(clients: int, bound: float) -> None:
    """All at the bound with the most examples: the sum is K·L, still a positive int32, and one client more would wrap it."""
    code = FixedPoint(bound, 65536, clients)
    words = code.encode(np.array([bound, -bound]), 65536)
    assert words.tolist() == [code.levels, 2**32 - code.levels, 65536]
    total = (words.astype(np.uint64) * np.uint64(clients) % np.uint64(2**32)).astype(np.uint32)
    sum_, examples = code.decode(total)
    np.testing.assert_allclose(sum_, clients * 65536.0 * np.array([bound, -bound]), rtol=1e-13)
    assert examples == clients * 65536
    if clients < 65535:
        assert (clients + 1) * code.levels > 2**31 - 1


@given(st.integers(2, 200), st.integers(1, 10**6), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_the_mean_is_as_near_as_the_docstring_says(clients: int, most: int, bound: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    code = FixedPoint(bound, most, clients)
    vectors, examples = rng.uniform(-bound, bound, (clients, 5)), rng.integers(1, most + 1, clients)
    total = np.sum([code.encode(x, int(n)) for x, n in zip(vectors, examples, strict=True)], axis=0, dtype=np.uint32)
    sum_, n = code.decode(total)
    allowed = clients * code.step / (2 * n) * (1 + 2.0**-19)
    assert n == examples.sum() and np.abs(sum_ / n - examples @ vectors / n).max() <= allowed
    equal = code.decode(np.sum([code.encode(x, most) for x in vectors], axis=0, dtype=np.uint32))[0] / (most * clients)
    assert np.abs(equal - vectors.mean(axis=0)).max() <= clients * bound / 2**32 * (1 + 1e-4)


@pytest.mark.parametrize("vector", [[0.0, 0.12345], [-0.12345, 0.0], [np.nan, 0.0], [0.0, np.inf]])
def test_above_the_bound_is_refused_and_the_sentence_gives_no_value_away(vector: list[float]) -> None:
    with pytest.raises(ValueError, match=r"above bound=0\.1 in magnitude") as refusal:
        FixedPoint(0.1, 10, 3).encode(np.array(vector), 5)
    assert "12345" not in str(refusal.value)


@pytest.mark.parametrize("examples", [0, -1, 11])
def test_the_number_of_examples_is_held_to_its_bound(examples: int) -> None:
    with pytest.raises(ValueError, match="not within 1 and most_examples=10"):
        FixedPoint(0.1, 10, 3).encode(np.zeros(2), examples)


@pytest.mark.parametrize(("bound", "most"), [(0.0, 1), (-1.0, 1), (np.inf, 1), (np.nan, 1), (1.0, 0), (1.0, 2**30)])
def test_a_code_that_cannot_hold_the_sum_is_refused(bound: float, most: int) -> None:
    FixedPoint(1.0, 2**30 - 1, 4)
    with pytest.raises(ValueError, match="must be"):
        FixedPoint(bound, most, 4)


# ---- the sum


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_sum_is_the_plain_one_in_bits_whoever_drops_out_when(data: st.DataObject) -> None:
    clients = data.draw(st.lists(st.integers(0, 2**40), min_size=2, max_size=9, unique=True))
    terms = Terms(data.draw(st.integers(len(clients) // 2 + 1, len(clients))), 0.3, 1000)
    lost = data.draw(st.permutations(clients))[: len(clients) - terms.threshold]
    silent: dict[str, set[int]] = {}
    for client in lost:
        silent.setdefault(data.draw(st.sampled_from(ACTIONS)), set()).add(client)
    members = cohort(clients, terms, data.draw(st.integers(0, 99)), silent=silent)
    masked = check_sum(members, clients, terms)
    assert set(clients) - set(masked) == set().union(*(silent.get(action, NONE) for action in ACTIONS[:3]))
    assert not members.refusals


@pytest.mark.parametrize("action", ACTIONS)
def test_at_every_message_some_may_drop_out_down_to_the_threshold(action: str) -> None:
    clients, terms = list(range(6)), Terms(4, 1.0, 9)
    masked = check_sum(cohort(clients, terms, silent={action: {0, 4}}), clients, terms)
    assert masked == (clients if action == "unmask" else [1, 2, 3, 5])
    below = cohort(clients, terms, silent={action: {0, 2, 4}})
    with pytest.raises(RunError, match=rf"asks for threshold=4 clients, and only 3 of 6 answered '{action}'"):
        below.sum(clients, terms)


def test_too_few_to_begin_with() -> None:
    with pytest.raises(RunError, match="asks for threshold=4 clients, and only 3 take part"):
        secure_sum(lambda action, contents: {}, dict.fromkeys([1, 2, 3], 1), SIZE, Terms(4, 1.0))


@pytest.mark.parametrize(
    ("threshold", "sentence"), [(1, "must be at least 2|asks for 2"), (3, "must be above half of the 6 clients")]
)
def test_a_threshold_that_does_not_protect_is_refused_on_both_sides(threshold: int, sentence: str) -> None:
    terms = Terms(threshold, 1.0)
    with pytest.raises(ValueError, match=sentence):
        secure_sum(lambda action, contents: {}, dict.fromkeys(range(2 * threshold), 1), SIZE, terms)
    with pytest.raises(ValueError, match=sentence):
        joined(terms, 2 * threshold)[0].share(listed(joined(terms, 2 * threshold)))


def test_terms_that_no_code_fits_are_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ValueError, match="bound=0"):
        secure_sum(lambda action, contents: pytest.fail("asked"), dict.fromkeys([1, 2, 3], 1), SIZE, Terms(2, 0.0))


def test_other_keys_give_the_same_bits() -> None:
    clients, terms = list(range(5)), Terms(3, 1.0, 9)
    runs = [cohort(clients, terms, silent={"mask": {2}}, random=source) for source in (injected(1), injected(2), None)]
    totals = [members.sum(clients, terms) for members in runs]
    assert len({(t.sum.tobytes(), t.examples) for t in totals}) == 1
    masked = [members.answers["mask"][0]["masked"] for members in runs]
    for i, left in enumerate(masked):
        for right in masked[:i]:
            assert not np.any(left == right)  # 18 words: chance has 4e-9


def test_an_answer_of_another_form_counts_as_none() -> None:
    clients, terms = list(range(5)), Terms(3, 1.0, 9)

    def spoil(action: str, answers: dict[int, Arrays]) -> dict[int, Arrays]:
        if action == "mask":
            answers[0], answers[1] = answers[0] | {"masked": answers[0]["masked"][:-1]}, {}
        return answers

    members = cohort(clients, terms, tamper=spoil)
    total = members.sum(clients, terms)
    assert members.drops.keys() == {0, 1}
    assert members.drops[0] == "its answer to mask: masked is missing, or is not uint32 of shape 18"
    assert total.clients == [2, 3, 4]
    assert total.sum.tobytes() == plain(members, [2, 3, 4], 5, terms)[0].tobytes()


def test_a_client_above_the_bound_drops_out_and_the_others_are_summed() -> None:
    clients, terms = list(range(5)), Terms(3, 1.0, 9)
    members = cohort(clients, terms)
    members.vectors[3][7] = 1.0000001
    assert check_sum(members, clients, terms) == [0, 1, 2, 4]
    assert members.refusals == {3: "a coordinate is above bound=1 in magnitude, or is not a number"}


# ---- what the server sees


def bytes_statistic(words: np.ndarray) -> float:
    """Pearson's χ² of the bytes against a uniform law; 255 degrees of freedom, so 255 ± 23."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    return float(np.sum((counts - counts.mean()) ** 2) / counts.mean())


def test_a_masked_vector_looks_uniform() -> None:
    """Keys are fixed, so the statistic is a fixed number; the data are the least uniform there are."""
    clients, terms, size = list(range(4)), Terms(3, 1.0), 100_000
    members = Cohort({k: np.zeros(size) for k in clients}, dict.fromkeys(clients, 1), random=injected(0))
    total = members.sum(clients, terms, size)
    assert not total.sum.any()
    masked = [members.answers["mask"][k]["masked"] for k in clients]
    for i, words in enumerate(masked):
        assert 170 < bytes_statistic(words) < 350
        assert all(170 < bytes_statistic(words - other) < 350 for other in masked[:i])  # nor do two of them tell more
    assert bytes_statistic(FixedPoint(1.0, 1, 4).encode(np.zeros(size), 1)) > 1e6


def test_every_pair_has_a_mask_of_its_own_which_both_sides_know() -> None:
    secrets = [bytes([k]) * crypto.SECRET for k in range(4)]
    publics = [crypto.public_key(secret) for secret in secrets]
    masks = {(i, j): pair_mask(i, secrets[i], j, publics[j], 8) for i in range(4) for j in range(4) if i != j}
    assert all(not np.any(masks[i, j] + masks[j, i]) for i, j in masks)
    assert len({mask.tobytes() for mask in masks.values()}) == 12
    assert len({crypto.agree(secrets[0], publics[1], purpose) for purpose in ("pair mask", "sealed share")}) == 2


def test_of_every_client_the_server_gets_one_of_two_secrets() -> None:
    """Keys are known here, so that what the shares combine to can be told: by the list that names the client."""
    clients, terms = list(range(5)), Terms(3, 1.0, 9)
    members = cohort(clients, terms, silent={"mask": {1, 3}}, random=injected(5))
    members.sum(clients, terms)
    request = members.requests["unmask"][0]
    assert (request["alive"].tolist(), request["dropped"].tolist()) == ([0, 2, 4], [1, 3])
    rows = [members.answers["unmask"][k]["shares"] for k in (0, 2, 4)]
    for row, client in enumerate([0, 2, 4, 1, 3]):
        of_mask, _, of_self = drawn(injected(5), client)
        secret = crypto.combine([0, 2, 4], [shares[row].tobytes() for shares in rows])
        assert secret == (of_mask if client in (1, 3) else of_self) and of_mask != of_self
        assert crypto.combine([0, 2], [shares[row].tobytes() for shares in rows[:2]]) not in (of_mask, of_self)


def test_a_vector_that_comes_too_late_stays_hidden_by_its_own_mask() -> None:
    """By then the server has the mask key of the client it gave up; only the own mask's secret would lay the vector open."""
    clients, terms, size = list(range(4)), Terms(3, 1.0), 10_000
    late: dict[int, Arrays] = {}

    def delay(action: str, answers: dict[int, Arrays]) -> dict[int, Arrays]:
        if action == "mask":
            late[2] = answers.pop(2)
        return answers

    members = cohort(clients, terms, size=size, random=injected(6), tamper=delay)
    assert members.sum(clients, terms, size).clients == [0, 1, 3]
    of_mask, _, of_self = drawn(injected(6), 2)
    seen = late[2]["masked"]
    for peer in (0, 1, 3):
        public = crypto.public_key(drawn(injected(6), peer)[0])
        seen = seen - pair_mask(2, of_mask, peer, public, size + 1)
    assert 170 < bytes_statistic(seen) < 350
    assert np.array_equal(seen - own_mask(of_self, size + 1), FixedPoint(1.0, 1, 4).encode(members.vectors[2], 1))


# ---- what a client refuses


def joined(terms: Terms, clients: int) -> list[Participant]:
    participants = [Participant.join(k) for k in range(clients)]
    for participant in participants:
        participant.advertise({"terms": terms.to_array(), "challenge": np.frombuffer(crypto.public_key(bytes(16)), np.uint8)})
    return participants


def listed(participants: list[Participant]) -> Arrays:
    return {"clients": np.arange(len(participants)), "keys": np.stack([p._keys() for p in participants])}


def shared(clients: int = 4, threshold: int = 3) -> tuple[list[Participant], dict[int, Arrays]]:
    participants = joined(Terms(threshold, 1.0, 9), clients)
    rows = [p.share(listed(participants)) for p in participants]
    of = {k: {name: np.stack([row[name][k] for row in rows]) for name in rows[0]} for k in range(clients)}
    return participants, {k: {"clients": np.arange(clients)} | arrays for k, arrays in of.items()}


def refused(sentence: str, participant: Participant, action: str, content: Arrays, *own) -> None:
    """It raises, and the state is that of before, so that an honest request may follow."""
    before = saved(participant.state)
    with pytest.raises(ValueError, match=sentence) as refusal:
        getattr(participant, action)(content, *own)
    assert "\n" not in str(refusal.value) and saved(participant.state) == before


def test_lists_of_keys_that_a_client_refuses() -> None:
    participants = joined(Terms(3, 1.0, 9), 4)
    first, good = participants[0], listed(participants)
    twice, other, ids = good["keys"].copy(), good["keys"].copy(), good["clients"].copy()
    twice[2, 0], other[0], ids[2] = twice[1, 0], joined(Terms(3, 1.0), 1)[0]._keys(), 1
    refused("only 2 clients", first, "share", {name: array[:2] for name, array in good.items()})
    refused("the same number or the same key", first, "share", good | {"keys": twice})
    refused("the same number or the same key", first, "share", good | {"clients": ids})
    refused("own keys", first, "share", good | {"keys": other})
    refused("own keys", first, "share", good | {"clients": np.array([9, 1, 2, 3])})
    assert first.share(good)["shares"].shape == (4, 60)


def test_shares_that_a_client_refuses() -> None:
    participants, contents = shared()
    first, good, x = participants[0], contents[0], np.zeros(SIZE)

    def some(rows: list[int]) -> Arrays:
        return {name: array[rows] for name, array in good.items()}

    for rows in ([0, 1], [1, 2, 3], [0, 1, 1]):
        refused("too few clients have shared", first, "mask", some(rows), x, 1)
    refused("without having advertised", first, "mask", good | {"clients": np.array([0, 1, 2, 7])}, x, 1)
    refused("above bound", first, "mask", good, x + 2, 1)
    refused("number of examples", first, "mask", good, x, 10)
    assert first.mask(some([3, 0, 2]), x, 1)["masked"].shape == (SIZE + 1,)


def test_unmasking_that_a_client_refuses() -> None:
    participants, contents = shared()
    first = participants[0]
    first.mask(contents[0], np.zeros(SIZE), 1)

    def lists(alive: list[int], dropped: list[int]) -> Arrays:
        return {"alive": np.array(alive, np.int64), "dropped": np.array(dropped, np.int64)}

    refused("both secrets of one client", first, "unmask", lists([0, 1, 2, 3], [3]))
    refused("both secrets of one client", first, "unmask", lists([0, 1, 2], [3, 2]))
    refused("not those that have shared", first, "unmask", lists([0, 1, 2], []))
    refused("not those that have shared", first, "unmask", lists([0, 1, 2, 3], [4]))
    refused("not those that have shared", first, "unmask", lists([0, 1, 2], [3, 3]))
    refused("too few clients are left", first, "unmask", lists([0, 1], [2, 3]))
    refused("too few clients are left", first, "unmask", lists([1, 2, 3], [0]))
    assert first.unmask(lists([0, 1, 2], [3]))["shares"].shape == (4, 16)
    refused("out of turn", first, "unmask", lists([0, 1, 3], [2]))  # the other secret of client 2, asked for later
    assert first.state.keys() == {"next", "client"}


def test_messages_come_in_their_order_and_once() -> None:
    participants, contents = shared()
    participants[1].mask(contents[1], np.zeros(SIZE), 1)
    waiting = [Participant.join(0), joined(Terms(3, 1.0), 1)[0], participants[0], participants[1]]
    for now, participant in enumerate(waiting):
        for action in ACTIONS[:now] + ACTIONS[now + 1 :]:
            own = (np.zeros(SIZE), 1) if action == "mask" else ()
            refused(f"asked to {action} out of turn", participant, action, {}, *own)


def test_no_secret_of_its_own_is_kept_once_the_vector_is_masked() -> None:
    participants, contents = shared()
    secrets = participants[0].state["secrets"]
    assert secrets.shape == (3, 16) and len(np.unique(secrets, axis=0)) == 3
    participants[0].mask(contents[0], np.zeros(SIZE), 1)
    assert participants[0].state.keys() == {"next", "client", "terms", "peers", "shares"}

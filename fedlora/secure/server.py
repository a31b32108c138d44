"""The server's side of a secure sum."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedlora.check import RunError
from fedlora.secure import crypto
from fedlora.secure.forms import Arrays, form
from fedlora.secure.identity import SIGNATURE
from fedlora.secure.participant import MASK, SEALED, SELF, own_mask, pair_mask, possession, share_digest
from fedlora.secure.terms import Terms

Ask = Callable[[str, dict[int, Arrays]], Mapping[int, Arrays]]  # (action, {client: content}) → {client: answer}
Keys = dict[int, np.ndarray]  # by client, (3, 32) uint8
Forms = dict[str, tuple[type, tuple[int, ...]]]  # of the arrays of an answer, by name


class Total(NamedTuple):
    """What the server learns."""

    sum: np.ndarray  # Σ n_k x_k, (d,) float64, to `FixedPoint`'s precision
    examples: int  # Σ n_k
    clients: list[int]  # whose vectors are in the sum, sorted


def secure_sum(
    ask: Ask,
    examples: Mapping[int, int],
    size: int,
    terms: Terms,
    drop: Callable[[int, str], object] = lambda client, why: None,
    settle: Callable[[list[int]], object] = lambda clients: None,
) -> Total:
    """Σ n_k x_k and Σ n_k over those clients that send their masked vectors of `size` coordinates.

    `examples` has n_k of every client as it said before. `ask` sends one of `ACTIONS` to clients and returns the answers of
    those that gave one. A client may drop out at each action, and an answer that is not of the form asked for counts as
    none; `drop` is told who, and why. Those that drop out before their masked vector arrived are not in the sum, those that
    do so after are. `settle` is given the clients of the sum before anybody is asked to unmask it.

    A client whose signature or whose shares too few of the others accept is dropped, and the sum begins again without it:
    until `settle` is called nothing has been unmasked, and every beginning has fresh masks.

    Guarantee: the sum is that of the clients' vectors, or RunError is raised. A wrong share is found by its digest, and the
    others' are used. Masks that cannot be removed name the client that dealt them. Of a vector that was masked wrongly, which
    nobody can see, the sum tells in the number of examples, and in a coordinate beyond the bound.
    Bits do not depend on keys, nor on the order of answers: integers modulo 2³² are added, and the masks cancel exactly.
    Raises ValueError for terms that cannot hold, RunError also where fewer than the threshold remain.
    """
    left = dict(sorted(examples.items()))
    while True:
        _enough(terms, len(left), "take part")
        terms.code(len(left))  # so that terms that cannot hold are known before anybody is asked
        try:
            return _Attempt(ask, size, terms, drop).total(left, settle)
        except _WithoutSome as fewer:
            left = {client: left[client] for client in fewer.left}


class _WithoutSome(Exception):
    """The sum has to begin again with those that are left."""

    def __init__(self, left: list[int]) -> None:
        self.left = left


class _Attempt:
    """The four messages once."""

    def __init__(self, ask: Ask, size: int, terms: Terms, drop: Callable[[int, str], object]) -> None:
        self.ask, self.size, self.terms, self.drop = ask, size, terms, drop

    def total(self, examples: Mapping[int, int], settle: Callable[[list[int]], object]) -> Total:
        keys, listed = self._advertised(list(examples))
        place = {client: index for index, client in enumerate(keys)}
        dealt = self._dealt(list(keys), listed)
        masked = self._masked(dealt, place)
        alive, dropped = list(masked), [client for client in dealt if client not in masked]
        settle(alive)
        held = self._unmasking(dealt, masked, alive + dropped, place)

        total = np.zeros(self.size + 1, np.uint32)
        for answer in masked.values():
            total += answer["masked"]
        for client in alive:
            total -= own_mask(self._secret(client, held[client], place, keys[client][SELF]), total.size)
        for client in dropped:
            secret = self._secret(client, held[client], place, keys[client][MASK])
            for peer in alive:
                total += pair_mask(client, secret, peer, keys[peer][MASK].tobytes(), total.size)
        return self._checked(Total(*self.terms.code(len(keys)).decode(total), alive), examples, len(keys))

    def _advertised(self, clients: list[int]) -> tuple[Keys, Arrays]:
        """The keys of those that hold them, and the list of clients that all are sent."""
        secret = os.urandom(crypto.SECRET)
        challenge = np.frombuffer(crypto.public_key(secret), np.uint8)
        asked = {"terms": self.terms.to_array(), "challenge": challenge}
        forms: Forms = {"keys": (np.uint8, (3, crypto.KEY)), "proof": (np.uint8, (3, crypto.KEY))}
        answers = self._gather("advertise", dict.fromkeys(clients, asked), forms)
        for client, answer in list(answers.items()):
            if not _holds(client, answer, secret):
                self.drop(client, "it does not hold the keys that it sent, or no sum can use them")
                del answers[client]
        owners: dict[bytes, list[int]] = {}
        for client, answer in answers.items():
            for key in answer["keys"]:
                owners.setdefault(key.tobytes(), []).append(client)
        for client in {client for those in owners.values() if len(those) > 1 for client in those}:
            self.drop(client, "another client holds a key of its own too; clients must not share a machine's state")
            del answers[client]
        _enough(self.terms, len(answers), f"of {len(clients)} answered 'advertise'")
        keys = {client: answer["keys"] for client, answer in answers.items()}
        listed = {"clients": np.array(list(keys)), "keys": np.stack(list(keys.values()))}
        if any("signature" in answer for answer in answers.values()):
            listed["signatures"] = np.stack([_signature(answer) for answer in answers.values()])
        return keys, listed

    def _dealt(self, roster: list[int], listed: Arrays) -> dict[int, Arrays]:
        """What each client has dealt to all of the roster: sealed shares, and their digests."""
        forms: Forms = {
            "shares": (np.uint8, (len(roster), SEALED)),
            "digests": (np.uint8, (len(roster), 2, crypto.DIGEST)),
        }
        refusal: Forms = {"refused": (np.uint8, (len(roster),))}
        answers = self._gather("share", dict.fromkeys(roster, listed), forms, refusal)
        refused = {client: answer["refused"] for client, answer in answers.items() if "refused" in answer}
        self._outvote(list(answers), roster, list(refused.values()), "its keys are not signed by whom the others know")
        for client, flags in refused.items():
            whom = ", ".join(str(other) for other, flag in zip(roster, flags, strict=True) if flag)
            self.drop(client, f"it alone does not know who signed the keys of client {whom}: see its list of peers")
            del answers[client]
        _enough(self.terms, len(answers), f"of {len(roster)} answered 'share'")
        return answers

    def _masked(self, dealt: dict[int, Arrays], place: dict[int, int]) -> dict[int, Arrays]:
        """The masked vectors, and which of the shares that they were sent the clients could open."""
        peers = list(dealt)
        theirs = {
            client: {"clients": np.array(peers)}
            | {name: np.stack([rows[name][place[client]] for rows in dealt.values()]) for name in ("shares", "digests")}
            for client in peers
        }
        forms: Forms = {"masked": (np.uint32, (self.size + 1,)), "opened": (np.uint8, (len(peers),))}
        masked = self._gather("mask", theirs, forms)
        _enough(self.terms, len(masked), f"of {len(peers)} answered 'mask'")
        closed = [answer["opened"] == 0 for answer in masked.values()]
        self._outvote(list(masked), peers, closed, "the shares that it dealt do not open")
        return masked

    def _unmasking(
        self, dealt: dict[int, Arrays], masked: dict[int, Arrays], order: list[int], place: dict[int, int]
    ) -> dict[int, dict[int, bytes]]:
        """The right shares of each client's secret, by the client that holds them; who gives a wrong one is dropped.

        `order` has the clients whose own masks are asked for, then those whose mask keys are.
        """
        alive = list(masked)
        lists = {"alive": np.array(alive), "dropped": np.array(order[len(alive) :], np.int64)}
        answers = self._gather("unmask", dict.fromkeys(alive, lists), {"shares": (np.uint8, (len(order), crypto.SECRET))})
        _enough(self.terms, len(answers), f"of {len(alive)} answered 'unmask'")
        held: dict[int, dict[int, bytes]] = {client: {} for client in order}
        for helper, answer in answers.items():
            opened = dict(zip(dealt, masked[helper]["opened"], strict=True))
            for client, array in zip(order, answer["shares"], strict=True):
                row, share = int(client in masked), array.tobytes()
                if not opened[client]:
                    continue
                if share_digest(client, helper, row, share) == dealt[client]["digests"][place[helper], row].tobytes():
                    held[client][helper] = share
                else:
                    self.drop(helper, f"the share of client {client}'s secret that it gives is not the one it was dealt")
        return held

    def _gather(
        self, action: str, contents: dict[int, Arrays], forms: Forms, instead: Forms | None = None
    ) -> dict[int, Arrays]:
        """The answers of the forms asked for, in order of client; one that has an array of `instead` is to be of those."""
        given = self.ask(action, contents)
        answers = {}
        for client in sorted(contents):
            if (answer := given.get(client)) is None:
                continue
            expected = instead if instead and instead.keys() & answer.keys() else forms
            try:
                for name, (dtype, shape) in expected.items():
                    form(answer, name, dtype, shape)
                answers[client] = dict(answer)
            except ValueError as reason:
                self.drop(client, f"its answer to {action}: {reason}")
        return answers

    def _outvote(self, voters: list[int], candidates: list[int], against: list[np.ndarray], why: str) -> None:
        """Begin again without the candidates that fewer voters than the threshold accept: their secrets cannot be learnt."""
        votes = np.sum(against, axis=0, dtype=int) if against else np.zeros(len(candidates), int)
        least = self.terms.threshold
        out = [c for c, no in zip(candidates, votes, strict=True) if len(voters) - no < least <= len(voters)]
        for client in out:
            self.drop(client, why)
        if out:
            raise _WithoutSome([client for client in voters if client not in out])

    def _secret(self, client: int, held: dict[int, bytes], place: dict[int, int], public: np.ndarray) -> bytes:
        """The secret of a client from the shares that the others hold. Raises RunError unless it is the one it made known."""
        helpers = sorted(held)[: self.terms.threshold]
        if len(helpers) < self.terms.threshold:
            raise RunError(
                f"the masks of client {client} cannot be removed from the secure sum: {len(helpers)} clients gave a right "
                f"share of its secret, and it takes threshold={self.terms.threshold}"
            )
        secret = crypto.combine([place[helper] for helper in helpers], [held[helper] for helper in helpers])
        if crypto.public_key(secret) != public.tobytes():
            raise RunError(
                f"the masks of client {client} cannot be removed from the secure sum: the shares that it dealt do not fit its "
                "keys; leave this client out"
            )
        return secret

    def _checked(self, total: Total, examples: Mapping[int, int], clients: int) -> Total:
        """Raises RunError for a sum that cannot be one of vectors within the bound."""
        said = sum(examples[client] for client in total.clients)
        largest = self.terms.bound * said + clients * self.terms.code(clients).step
        if total.examples == said and np.all(np.abs(total.sum) <= largest):
            return total
        raise RunError(
            f"the secure sum is over {total.examples} examples and at most {np.abs(total.sum).max(initial=0):.3g} in a "
            f"coordinate, and its clients have said {said} and promised {largest:.3g}: one of clients "
            f"{', '.join(map(str, total.clients))} sent what is no masked vector, and the masks hide which"
        )


def _enough(terms: Terms, clients: int, what: str) -> None:
    if clients < terms.threshold:
        raise RunError(f"the secure sum asks for threshold={terms.threshold} clients, and only {clients} {what}")


def _holds(client: int, answer: Arrays, secret: bytes) -> bool:
    """Whether a client has shown that it holds the private keys of its public ones."""
    try:
        shown = [possession(secret, key.tobytes(), client) for key in answer["keys"]]
    except ValueError:
        return False
    return shown == [proof.tobytes() for proof in answer["proof"]]


def _signature(answer: Arrays) -> np.ndarray:
    """What an answer is signed with; zeros, which nobody accepts, where it is not of the right form."""
    try:
        return form(answer, "signature", np.uint8, (SIGNATURE,))
    except ValueError:
        return np.zeros(SIGNATURE, np.uint8)

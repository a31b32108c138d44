"""A client's side of a secure sum."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from fedlora.secure import crypto
from fedlora.secure.terms import ACTIONS, Terms

Arrays = dict[str, np.ndarray]
MASK, SHARE, SELF = range(3)  # rows of the secrets: of the key that gives masks, of the key that seals shares, of the own mask


class Participant:
    """One client in one secure sum: a method for each message, in the order of `ACTIONS`, from content to answer.

    `state`, a dict of arrays, is all there is between two messages: `Participant(state)` goes on in another process. Save
    it before the answer leaves, since a state used twice gives away what the masks hide. It holds secrets of this client.

    Every method raises ValueError, one sentence without anything secret in it, where the server asks for what it must not
    have, or out of turn. The client then says no more than that sentence.
    """

    def __init__(self, state: Arrays) -> None:
        self.state = state

    @classmethod
    def join(cls, client: int, random: Callable[[int], bytes] = os.urandom) -> Participant:
        """A fresh participant; `random(n)` gives n secret bytes, the operating system's wherever somebody may look on.

        No sum depends on them, because the masks cancel exactly.
        """
        secrets = _bytes([random(crypto.SECRET) for _ in range(3)])
        return cls({"next": np.array([0]), "client": np.array([client]), "secrets": secrets})

    def advertise(self, content: Arrays) -> Arrays:
        """{terms (3,) float64} → {keys (2, 32) uint8}: the public keys, of masks and of sealed shares."""
        self._expect("advertise")
        self._advance(terms=content["terms"])
        return {"keys": self._public()}

    def share(self, content: Arrays) -> Arrays:
        """{clients (K,) int64, keys (K, 2, 32) uint8} → {shares (K, 60) uint8}, sealed, one row for each client.

        A row holds a share of the mask key's secret and one of the own mask's. The own row makes no exception.
        Refused: too few clients for the threshold, or too many, a key twice, a list without this client's keys.
        """
        self._expect("share")
        clients, keys, terms = content["clients"], content["keys"], self._terms()
        terms.code(len(clients))
        if len(np.unique(keys.reshape(-1, crypto.KEY), axis=0)) < 2 * len(clients) or len(np.unique(clients)) < len(clients):
            raise ValueError("two clients of the secure sum have the same number or the same key")
        place = np.flatnonzero(clients == self._client)
        if not place.size or not np.array_equal(keys[place[0]], self._public()):
            raise ValueError("the list of clients does not have this client's own keys")
        split = [crypto.split(self._secret(row), terms.threshold, len(clients)) for row in (MASK, SELF)]
        sealed = [
            crypto.seal(self._channel(key), of_mask + of_self, _route(self._client, other))
            for other, key, of_mask, of_self in zip(clients, keys, *split, strict=True)
        ]
        self._advance(clients=clients, keys=keys)
        return {"shares": _bytes(sealed)}

    def mask(self, content: Arrays, vector: np.ndarray, examples: int) -> Arrays:
        """{clients (P,) int64, shares (P, 60) uint8}, this client's `vector` (d,) and n_k → {masked (d + 1,) uint32}.

        The clients are those that have shared, and the shares what they sealed for this one. Refused: fewer than the
        threshold, one that is not on the first list, a share that does not open, a vector that `FixedPoint` refuses.
        """
        self._expect("mask")
        peers, terms, roster = content["clients"], self._terms(), self.state["clients"]
        keys = dict(zip(roster.tolist(), self.state["keys"], strict=True))
        if len(peers) < terms.threshold or len(np.unique(peers)) < len(peers) or self._client not in peers:
            raise ValueError("too few clients have shared their secrets, or the list of them does not have this client")
        if not set(peers.tolist()) <= keys.keys():
            raise ValueError("a client has shared secrets without having advertised keys")
        opened = [
            crypto.unseal(self._channel(keys[peer]), sealed.tobytes(), _route(peer, self._client))
            for peer, sealed in zip(peers.tolist(), content["shares"], strict=True)
        ]
        masked = terms.code(len(roster)).encode(vector, examples)
        masked += own_mask(self._secret(SELF), masked.size)
        for peer in peers.tolist():
            if peer != self._client:
                masked += pair_mask(self._client, self._secret(MASK), peer, keys[peer][MASK].tobytes(), masked.size)
        self.state = {name: self.state[name] for name in ("next", "client", "terms")}  # no secret is needed any more
        self._advance(peers=peers, shares=_bytes(opened))
        return {"masked": masked}

    def unmask(self, content: Arrays) -> Arrays:
        """{alive (P',) int64, dropped (P'',) int64} → {shares (P' + P'', 16) uint8}, in that order; the last message.

        Of those alive, whose masked vectors are in the sum, the share of their own mask; of the dropped, that of their mask
        key. Both for one client would lay its vector open. Refused: a client in both lists or in none, fewer alive than
        the threshold, this client not among them.
        """
        self._expect("unmask")
        alive, dropped, peers = content["alive"].tolist(), content["dropped"].tolist(), self.state["peers"].tolist()
        if set(alive) & set(dropped):
            raise ValueError("the server asks for both secrets of one client, as dropped and as alive")
        if sorted(alive + dropped) != sorted(peers):
            raise ValueError("the clients to unmask are not those that have shared their secrets")
        if len(alive) < self._terms().threshold or self._client not in alive:
            raise ValueError("too few clients are left to unmask, or this client is not among them")
        shares = dict(zip(peers, self.state["shares"].reshape(-1, 2, crypto.SECRET), strict=True))
        self.state = {name: self.state[name] for name in ("next", "client")}
        self._advance()
        return {"shares": np.stack([shares[peer][1] for peer in alive] + [shares[peer][0] for peer in dropped])}

    # ---- the parts

    @property
    def _client(self) -> int:
        return int(self.state["client"][0])

    def _terms(self) -> Terms:
        return Terms.from_array(self.state["terms"])

    def _secret(self, row: int) -> bytes:
        return self.state["secrets"][row].tobytes()

    def _public(self) -> np.ndarray:
        return _bytes([crypto.public_key(self._secret(row)) for row in (MASK, SHARE)])

    def _channel(self, keys: np.ndarray) -> bytes:
        return crypto.agree(self._secret(SHARE), keys[SHARE].tobytes(), "sealed share")

    def _expect(self, action: str) -> None:
        if int(self.state["next"][0]) != ACTIONS.index(action):
            raise ValueError(f"a secure sum was asked to {action} out of turn")

    def _advance(self, **known: np.ndarray) -> None:
        self.state = self.state | known | {"next": self.state["next"] + 1}


def own_mask(secret: bytes, size: int) -> np.ndarray:
    """The mask that a client adds by itself: `size` words, uint32."""
    return crypto.keystream(crypto.derive(secret, "own mask"), size)


def pair_mask(client: int, secret: bytes, peer: int, public: bytes, size: int) -> np.ndarray:
    """What `client` adds for `peer`, and `peer` for `client` with the opposite sign: `size` words, uint32."""
    stream = crypto.keystream(crypto.agree(secret, public, "pair mask"), size)
    return stream if client < peer else -stream


def _route(sender: int, receiver: int) -> bytes:
    return f"{sender} to {receiver}".encode()


def _bytes(rows: Sequence[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(row, np.uint8) for row in rows])

"""A client's side of a secure sum."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from fedlora.secure import crypto
from fedlora.secure.forms import Arrays, form
from fedlora.secure.terms import ACTIONS, Terms

MASK, SHARE, SELF = range(3)  # rows of the secrets: of the key that gives masks, of the key that seals shares, of the own mask
SEALED = crypto.NONCE + 2 * crypto.SECRET + crypto.TAG  # bytes of two shares that are sealed


class Participant:
    """One client in one secure sum: a method for each message, in the order of `ACTIONS`, from content to answer.

    `state`, a dict of arrays, is all there is between two messages: `Participant(state)` goes on in another process. Save
    it before the answer leaves, since a state used twice gives away what the masks hide. It holds secrets of this client.

    Every method raises ValueError, one sentence without anything secret in it, where the server asks for what it must not
    have, sends what is not of the form asked for, or is out of turn. The state is then that of before, and the client says
    no more than that sentence.
    """

    def __init__(self, state: Arrays) -> None:
        self.state = state

    @classmethod
    def join(cls, client: int, random: Callable[[int], bytes] = os.urandom, least: int = 2) -> Participant:
        """A fresh participant; `random(n)` gives n secret bytes, the operating system's wherever somebody may look on.

        No sum depends on them, because the masks cancel exactly. It takes part where the threshold is `least` or more.
        """
        secrets = _bytes([random(crypto.SECRET) for _ in range(3)])
        return cls({"next": np.array([0]), "client": np.array([client]), "least": np.array([least]), "secrets": secrets})

    def advertise(self, content: Arrays) -> Arrays:
        """{terms (3,) float64, challenge (32,) uint8} → {keys, proof}, both (3, 32) uint8.

        The keys: the public ones of masks and of sealed shares, and that of the own mask's secret, which binds to it. The
        proof: what each private key and the server's `challenge`, a public key of its own, give with this client's number.
        """
        self._expect("advertise")
        terms, challenge = Terms.read(content), form(content, "challenge", np.uint8, (crypto.KEY,)).tobytes()
        if terms.threshold < (least := int(self.state["least"][0])):
            raise ValueError(f"threshold={terms.threshold} leaves too few clients in the sum; this client asks for {least}")
        proof = _bytes([possession(self._secret(row), challenge, self._client) for row in range(3)])
        self._advance(terms=terms.to_array())
        return {"keys": self._keys(), "proof": proof}

    def share(self, content: Arrays) -> Arrays:
        """{clients (K,) int64, keys (K, 3, 32) uint8} → {shares (K, 60) uint8, digests (K, 2, 16) uint8}, a row a client.

        A row of shares is sealed and holds one of the mask key's secret and one of the own mask's. Their digests are for
        everybody. The own row makes no exception.
        Refused: too few clients for the threshold, or too many, a key twice or of low order, a list without its own keys.
        """
        self._expect("share")
        clients, terms = form(content, "clients", np.int64, (None,)), self._terms()
        keys = form(content, "keys", np.uint8, (len(clients), 3, crypto.KEY))
        terms.code(len(clients))
        if len(np.unique(keys.reshape(-1, crypto.KEY), axis=0)) < 3 * len(clients) or len(np.unique(clients)) < len(clients):
            raise ValueError("two clients of the secure sum have the same number or the same key")
        place = np.flatnonzero(clients == self._client)
        if not place.size or not np.array_equal(keys[place[0]], self._keys()):
            raise ValueError("the list of clients does not have this client's own keys")
        split = [crypto.split(self._secret(row), terms.threshold, len(clients)) for row in (MASK, SELF)]
        sealed = [
            crypto.seal(self._channel(key), of_mask + of_self, _route(self._client, other))
            for other, key, of_mask, of_self in zip(clients.tolist(), keys, *split, strict=True)
        ]
        digests = [digests_of(self._client, other, both) for other, both in zip(clients.tolist(), _pairs(split), strict=True)]
        self._advance(clients=clients, keys=keys)
        return {"shares": _bytes(sealed), "digests": np.stack(digests)}

    def mask(self, content: Arrays, vector: np.ndarray, examples: int) -> Arrays:
        """{clients (P,) int64, shares (P, 60), digests (P, 2, 16) uint8}, its `vector` (d,) and n_k → {masked, opened}.

        The clients are those that have shared; shares and digests are what they made for this one. `masked` (d + 1,) uint32
        is n_k · `vector` and n_k, behind masks; `opened` (P,) uint8 is 1 where a share opens and is that of the digests: a
        client whose shares do not costs no other its place in the sum.
        Refused: fewer than the threshold, one that is not on the first list, a vector that `FixedPoint` refuses.
        """
        self._expect("mask")
        peers, terms, roster = form(content, "clients", np.int64, (None,)), self._terms(), self.state["clients"]
        shares = form(content, "shares", np.uint8, (len(peers), SEALED))
        digests = form(content, "digests", np.uint8, (len(peers), 2, crypto.DIGEST))
        keys = dict(zip(roster.tolist(), self.state["keys"], strict=True))
        if len(peers) < terms.threshold or len(np.unique(peers)) < len(peers) or self._client not in peers:
            raise ValueError("too few clients have shared their secrets, or the list of them does not have this client")
        if not set(peers.tolist()) <= keys.keys():
            raise ValueError("a client has shared secrets without having advertised keys")
        opened = [
            self._opened(peer, keys[peer], sealed.tobytes(), expected)
            for peer, sealed, expected in zip(peers.tolist(), shares, digests, strict=True)
        ]
        masked = terms.code(len(roster)).encode(vector, examples)
        masked += own_mask(self._secret(SELF), masked.size)
        for peer in peers.tolist():
            if peer != self._client:
                masked += pair_mask(self._client, self._secret(MASK), peer, keys[peer][MASK].tobytes(), masked.size)
        self.state = {name: self.state[name] for name in ("next", "client", "terms")}  # no secret is needed any more
        self._advance(peers=peers, shares=_bytes([share or bytes(2 * crypto.SECRET) for share in opened]))
        return {"masked": masked, "opened": np.array([share is not None for share in opened], np.uint8)}

    def unmask(self, content: Arrays) -> Arrays:
        """{alive (P',) int64, dropped (P'',) int64} → {shares (P' + P'', 16) uint8}, in that order; the last message.

        Of those alive, whose masked vectors are in the sum, the share of their own mask; of the dropped, that of their mask
        key; zeros where it did not open. Both for one client would lay its vector open. Refused: a client in both lists or
        in none, fewer alive than the threshold, this client not among them.
        """
        self._expect("unmask")
        alive, dropped = (form(content, name, np.int64, (None,)).tolist() for name in ("alive", "dropped"))
        peers = self.state["peers"].tolist()
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
        return Terms.read(self.state)

    def _secret(self, row: int) -> bytes:
        return self.state["secrets"][row].tobytes()

    def _keys(self) -> np.ndarray:
        return _bytes([crypto.public_key(self._secret(row)) for row in range(3)])

    def _channel(self, keys: np.ndarray) -> bytes:
        return crypto.agree(self._secret(SHARE), keys[SHARE].tobytes(), "sealed share")

    def _opened(self, peer: int, keys: np.ndarray, sealed: bytes, expected: np.ndarray) -> bytes | None:
        """The two shares that a peer has sealed for this client; None where they are not what their digests say."""
        try:
            both = crypto.unseal(self._channel(keys), sealed, _route(peer, self._client))
        except ValueError:
            return None
        return both if np.array_equal(digests_of(peer, self._client, both), expected) else None

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


def possession(secret: bytes, challenge: bytes, client: int) -> bytes:
    """32 bytes that only the holders of the secret, or of that of the public key `challenge`, can make for a client."""
    return crypto.agree(secret, challenge, f"possession by {client}")


def digests_of(sender: int, receiver: int, both: bytes) -> np.ndarray:
    """The digests (2, 16) uint8 of a share of the mask key's secret and of one of the own mask's, both 16 bytes."""
    return _bytes([share_digest(sender, receiver, row, both[16 * row : 16 * row + 16]) for row in range(2)])


def share_digest(sender: int, receiver: int, row: int, share: bytes) -> bytes:
    """The digest of one share: of the mask key's secret (row 0) or of the own mask's (row 1)."""
    return crypto.digest(share, f"share {row} of {sender} for {receiver}")


def _pairs(split: list[list[bytes]]) -> list[bytes]:
    return [of_mask + of_self for of_mask, of_self in zip(*split, strict=True)]


def _route(sender: int, receiver: int) -> bytes:
    return f"{sender} to {receiver}".encode()


def _bytes(rows: Sequence[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(row, np.uint8) for row in rows])

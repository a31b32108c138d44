"""The server's side of a secure sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedlora.check import RunError
from fedlora.secure import crypto
from fedlora.secure.participant import MASK, Arrays, own_mask, pair_mask
from fedlora.secure.terms import Terms

Ask = Callable[[str, dict[int, Arrays]], Mapping[int, Arrays]]  # (action, {client: content}) → {client: answer}
Answers = dict[int, np.ndarray]


class Total(NamedTuple):
    """What the server learns."""

    sum: np.ndarray  # Σ n_k x_k, (d,) float64, to `FixedPoint`'s precision
    examples: int  # Σ n_k
    clients: list[int]  # whose vectors are in the sum, sorted


def secure_sum(ask: Ask, clients: Sequence[int], size: int, terms: Terms) -> Total:
    """Σ n_k x_k and Σ n_k over those of `clients` that send their masked vectors of `size` coordinates.

    `ask` sends one of `ACTIONS` to clients and returns the answers of those that gave one; it is called four times. A
    client may drop out at each, and an answer that is not of the form asked for counts as none. Those that drop out before
    their masked vector arrived are not in the sum, those that do so after are.

    Bits do not depend on keys, nor on the order of answers: integers modulo 2³² are added, and the masks cancel exactly.
    Raises RunError where fewer than the threshold remain or shares do not fit, ValueError for terms that cannot hold.
    """

    def enough(answers: int, what: str) -> None:
        if answers < terms.threshold:
            raise RunError(f"the secure sum asks for threshold={terms.threshold} clients, and only {answers} {what}")

    def gather(action: str, contents: dict[int, Arrays], name: str, dtype: type, shape: tuple[int, ...]) -> Answers:
        given = {client: content[name] for client, content in sorted(ask(action, contents).items()) if name in content}
        answers = {client: array for client, array in given.items() if array.dtype == dtype and array.shape == shape}
        enough(len(answers), f"of {len(contents)} answered '{action}'")
        return answers

    enough(len(clients), "take part")
    terms.code(len(clients))  # so that terms that cannot hold are known before anybody is asked
    keys = gather("advertise", {c: {"terms": terms.to_array()} for c in clients}, "keys", np.uint8, (2, crypto.KEY))
    roster = list(keys)
    place = {client: index for index, client in enumerate(roster)}

    listed = {"clients": np.array(roster), "keys": np.stack(list(keys.values()))}
    width = crypto.NONCE + 2 * crypto.SECRET + crypto.TAG
    sealed = gather("share", dict.fromkeys(roster, listed), "shares", np.uint8, (len(roster), width))
    peers = np.array(list(sealed))

    theirs = {c: {"clients": peers, "shares": np.stack([rows[place[c]] for rows in sealed.values()])} for c in sealed}
    masked = gather("mask", theirs, "masked", np.uint32, (size + 1,))
    alive, dropped = list(masked), [client for client in sealed if client not in masked]

    lists = {"alive": np.array(alive), "dropped": np.array(dropped, peers.dtype)}
    shares = gather("unmask", dict.fromkeys(alive, lists), "shares", np.uint8, (len(peers), crypto.SECRET))
    helpers = list(shares)[: terms.threshold]
    secrets = {
        client: crypto.combine([place[h] for h in helpers], [shares[h][row].tobytes() for h in helpers])
        for row, client in enumerate(alive + dropped)
    }

    total = np.zeros(size + 1, np.uint32)
    for vector in masked.values():
        total += vector
    for client in alive:
        total -= own_mask(secrets[client], total.size)
    for client in dropped:
        if crypto.public_key(secrets[client]) != keys[client][MASK].tobytes():
            raise RunError(f"the shares of client {client}'s mask key do not fit its public key")
        for peer in alive:
            total += pair_mask(client, secrets[client], peer, keys[peer][MASK].tobytes(), total.size)
    return Total(*terms.code(len(roster)).decode(total), alive)

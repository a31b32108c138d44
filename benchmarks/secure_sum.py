"""What a secure sum costs, all its clients in this process: python -m benchmarks.secure_sum --clients 10 --lost 3 --signed."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from fedlora.secure import FixedPoint, Identity, Participant, Terms, secure_sum
from fedlora.secure.forms import Arrays


def identities(clients: int) -> list[Identity]:
    """A signing key for each client, and the public ones of all."""
    keys = [generate_private_key(SECP384R1()) for _ in range(clients)]
    peers = {client: key.public_key() for client, key in enumerate(keys)}
    return [Identity(client, key, peers) for client, key in enumerate(keys)]


def measure(clients: int, size: int, lost: int, signed: list[Identity]) -> tuple[float, float, int, int]:
    """Seconds of the server and of the median client, bytes of arrays up and down of the busiest; `lost` never mask."""
    terms, rng = Terms(2 * clients // 3 + 1, 0.1, 100), np.random.default_rng(0)
    vectors = rng.uniform(-terms.bound, terms.bound, (clients, size))
    participants = [Participant.join(k) for k in range(clients)]
    spent: dict[int, float] = defaultdict(float)
    up: dict[int, int] = defaultdict(int)
    down: dict[int, int] = defaultdict(int)

    def ask(action: str, contents: dict[int, Arrays]) -> dict[int, Arrays]:
        answers = {}
        for k in contents.keys() - (set(range(lost)) if action == "mask" else set()):
            began = time.perf_counter()
            if signed and action == "share":
                assert not signed[k].strangers(contents[k], "benchmark").any()
            answers[k] = getattr(participants[k], action)(contents[k], *((vectors[k], 50) if action == "mask" else ()))
            if signed and action == "advertise":
                answers[k]["signature"] = signed[k].sign(answers[k]["keys"], "benchmark")
            spent[k] += time.perf_counter() - began
            up[k] += sum(array.nbytes for array in answers[k].values())
            down[k] += sum(array.nbytes for array in contents[k].values())
        return answers

    began = time.perf_counter()
    total = secure_sum(ask, dict.fromkeys(range(clients), 50), size, terms)
    server = time.perf_counter() - began - sum(spent.values())
    wrong = np.abs(total.sum - 50 * vectors[total.clients].sum(axis=0)).max()
    assert wrong <= 0.51 * clients * FixedPoint(terms.bound, terms.most_examples, clients).step
    return server, float(np.median(list(spent.values()))), max(up.values()), max(down.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--signed", action="store_true", help="clients sign their keys and check all others', as devices do")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    signed = identities(args.clients) if args.signed else []
    measured = [measure(args.clients, args.size, args.lost, signed) for _ in range(args.repeats)]
    servers, each, up, down = zip(*measured, strict=True)
    for who, seconds in (("server", servers), ("client", each)):
        print(f"{who}: {1e3 * np.median(seconds):.1f} ms ({1e3 * min(seconds):.1f} … {1e3 * max(seconds):.1f})")
    print(f"a client's arrays: {up[0]} bytes up, {down[0]} down")

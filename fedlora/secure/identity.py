"""Who is who in a secure sum on devices: keys that are signed by the nodes they come from.

Each client signs what it advertises with its node's private key, and knows the public keys of all others from its owner, not
from the server. So a server cannot make up clients, nor put keys of its own in anybody's place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.check import ConfigError
from fedlora.secure.forms import Arrays, form

SIGNATURE, HALF = 96, 48  # bytes of a signature, r and s
CURE = "one line a client: its number and its public key (ecdsa-sha2-nistp384 …)"


class Identity:
    """One client's signing key, and the public keys of all clients that it takes part with."""

    def __init__(self, client: int, key: EllipticCurvePrivateKey, peers: dict[int, EllipticCurvePublicKey]) -> None:
        self.client, self.key, self.peers = client, key, peers

    @classmethod
    def load(cls, client: int, key: Path, peers: Path) -> Identity:
        """From an OpenSSH private key (ECDSA P-384) and a file of peers.

        Raises ConfigError for files that are not of this kind, a number or a key that is there twice, or peers among which
        this client does not have its own key.
        """
        try:
            private = load_ssh_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"--key {key} is no OpenSSH private key without a passphrase ({error})") from error
        if not isinstance(private, EllipticCurvePrivateKey) or not isinstance(private.curve, SECP384R1):
            raise ConfigError(f"--key {key} is not of ECDSA P-384; make one by ssh-keygen -t ecdsa -b 384")
        known = _peers(peers)
        if client not in known or known[client].public_numbers() != private.public_key().public_numbers():
            raise ConfigError(f"--peers {peers} does not have the public key of --key for client {client}; correct that line")
        return cls(client, private, known)

    def sign(self, keys: np.ndarray, sum_: str) -> np.ndarray:
        """The signature (96,) uint8 of this client's `keys` (3, 32) for the one sum that `sum_` names."""
        r, s = decode_dss_signature(self.key.sign(_statement(self.client, keys, sum_), ECDSA(SHA384())))
        return np.frombuffer(r.to_bytes(HALF, "big") + s.to_bytes(HALF, "big"), np.uint8)

    def strangers(self, content: Arrays, sum_: str) -> np.ndarray:
        """1 (K,) uint8 for each client of the list whose keys are not signed, for this sum, by the peer of its number.

        Raises ValueError for a list that is not of the form of `Participant.share`, with signatures (K, 96) uint8.
        """
        clients = form(content, "clients", np.int64, (None,))
        keys = form(content, "keys", np.uint8, (len(clients), 3, 32))
        signatures = form(content, "signatures", np.uint8, (len(clients), SIGNATURE))
        signed = [self._signed(*row, sum_) for row in zip(clients.tolist(), keys, signatures, strict=True)]
        return 1 - np.array(signed, np.uint8)

    def _signed(self, client: int, keys: np.ndarray, signature: np.ndarray, sum_: str) -> bool:
        if client not in self.peers:
            return False
        r, s = (int.from_bytes(half.tobytes(), "big") for half in (signature[:HALF], signature[HALF:]))
        try:
            self.peers[client].verify(encode_dss_signature(r, s), _statement(client, keys, sum_), ECDSA(SHA384()))
        except InvalidSignature:
            return False
        return True


def _statement(client: int, keys: np.ndarray, sum_: str) -> bytes:
    """What is signed: the text has no line break in it, and all that follows its last one are the keys."""
    return f"fedlora/secure/1\n{sum_}\nclient {client}\n".encode() + keys.tobytes()


def _peers(path: Path) -> dict[int, EllipticCurvePublicKey]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--peers {path} cannot be read ({error})") from error
    peers: dict[int, EllipticCurvePublicKey] = {}
    for place, line in enumerate(lines, start=1):
        number, _, text = line.strip().partition(" ")
        if not number or number.startswith("#"):
            continue
        try:
            key = load_ssh_public_key(text.strip().encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not number.isdecimal() or not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
            raise ConfigError(f"--peers {path}: line {place} is not as it must be; {CURE}")
        if int(number) in peers or key.public_numbers() in [other.public_numbers() for other in peers.values()]:
            raise ConfigError(f"--peers {path}: line {place} has a number or a key that is there before; {CURE}")
        peers[int(number)] = key
    return peers

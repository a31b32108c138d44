"""Secure sums on devices: keys signed by their nodes, lists that a server made up, and what a device remembers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import Error, Message

from fedlora.arrays import messages
from fedlora.check import ConfigError, RunError
from fedlora.deploy import client
from fedlora.deploy.account import Account
from fedlora.deploy.device import Device
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason
from fedlora.deploy.sums import SecureSums
from fedlora.secure import Identity, Terms
from fedlora.secure.forms import Arrays
from tests.test_checkpoint import fails_after
from tests.test_device import asked, folder, made, own, place, refusal, sent  # noqa: F401
from tests.test_federation import KEEPING, federation  # noqa: F401
from tests.test_rounds import outside_of_flower  # noqa: F401
from tests.test_secure import Cohort, cohort

CLIENTS, TERMS, SUM = list(range(5)), Terms(3, 1.0, 9), "experiment a, round 1"
KEYS = {client: generate_private_key(SECP384R1()) for client in range(6)}
PEERS = {client: key.public_key() for client, key in KEYS.items() if client < 5}
IDS = {client: Identity(client, KEYS[client], PEERS) for client in CLIENTS}


class Signed(Cohort):
    """Clients that sign, and check the list, as devices do; `knows` are the peers of some that know others."""

    knows: dict[int, Identity] = {}

    def play(self, action: str, client: int, content: Arrays) -> Arrays:
        identity = self.knows.get(client, IDS[client])
        if action == "share" and (strangers := identity.strangers(content, SUM)).any():
            return {"refused": strangers}
        answer = super().play(action, client, content)
        return answer | {"signature": identity.sign(answer["keys"], SUM)} if action == "advertise" else answer


def signed(**options) -> Signed:
    members = cohort(CLIENTS, TERMS)
    return Signed(members.vectors, members.examples, **options)


def test_keys_that_are_signed_are_summed() -> None:
    members = signed()
    assert members.sum(CLIENTS, TERMS).clients == CLIENTS and members.drops == {}


@pytest.mark.parametrize("forgery", ["none", "zeros", "another sum", "another client", "a key of its own", "half"])
def test_keys_that_their_peer_has_not_signed_cost_their_client(forgery) -> None:
    def forge(action: str, answers: dict[int, Arrays]) -> dict[int, Arrays]:
        if action == "advertise" and 2 in answers:
            own, keys = answers[2], answers[2]["keys"]
            own["signature"] = {
                "zeros": np.zeros(96, np.uint8),
                "another sum": IDS[2].sign(keys, SUM + "0"),
                "another client": IDS[3].sign(keys, SUM),
                "a key of its own": Identity(2, KEYS[5], PEERS).sign(keys, SUM),
                "half": own["signature"][:48],
                "none": own["signature"],
            }[forgery]
            if forgery == "none":
                del own["signature"]
        return answers

    members = signed(tamper=forge)
    assert members.sum(CLIENTS, TERMS).clients == [0, 1, 3, 4]
    assert members.drops == {2: "its keys are not signed by whom the others know"}


def test_a_client_that_knows_other_peers_is_dropped_itself() -> None:
    members = signed()
    members.knows = {1: Identity(1, KEYS[1], {k: key for k, key in PEERS.items() if k != 4})}
    assert members.sum(CLIENTS, TERMS).clients == [0, 2, 3, 4]
    assert members.drops == {1: "it alone does not know who signed the keys of client 4: see its list of peers"}


def test_clients_that_a_server_makes_up_are_strangers() -> None:
    """One honest client among four of the server's, whose private keys the server has."""
    members = cohort(CLIENTS, TERMS)
    members.sum(CLIENTS, TERMS)
    content = members.requests["share"][0]
    content["signatures"] = np.stack(
        [Identity(k, KEYS[k if k == 0 else 5], PEERS).sign(content["keys"][k], SUM) for k in CLIENTS]
    )
    assert IDS[0].strangers(content, SUM).tolist() == [0, 1, 1, 1, 1]
    for damaged in ({}, {"signatures": content["signatures"][:, :95]}, {"signatures": content["signatures"][:4]}):
        with pytest.raises(ValueError, match="signatures is missing, or is not uint8 of shape 5 × 96"):
            IDS[0].strangers({name: content[name] for name in ("clients", "keys")} | damaged, SUM)


# ---- the files of an owner


def written(folder, key=KEYS[0], lines: dict | None = None):  # noqa: F811
    (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    text = "# number key\n" + "".join(
        f"{k} {public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} device-{k}\n"
        for k, public in (lines or PEERS).items()
    )
    (folder / "peers").write_text(text)
    return folder / "key", folder / "peers"


def test_keys_and_peers_are_read_from_openssh_files(tmp_path) -> None:
    identity = Identity.load(0, *written(tmp_path))
    keys = np.zeros((3, 32), np.uint8)
    content = {"clients": np.array([0]), "keys": keys[None], "signatures": identity.sign(keys, SUM)[None]}
    assert IDS[3].strangers(content, SUM).tolist() == [0] and identity.peers.keys() == PEERS.keys()


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        ("p256", "is not of ECDSA P-384"), ("ed25519", "is not of ECDSA P-384"), ("text", "is no OpenSSH private key"),
        ("another", "does not have the public key of --key for client 0"), ("missing", "cannot be read"),
        ("twice", "line 3 has a number or a key that is there before"), ("number", "line 1 is not as it must be"),
        ("rsa", "line 1 is not as it must be"), ("bytes", "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_an_owner_must_put_right(tmp_path, which, sentence) -> None:
    kinds = {"p256": generate_private_key(SECP256R1()), "ed25519": Ed25519PrivateKey.generate(), "another": KEYS[1]}
    key, peers = written(tmp_path, kinds.get(which, KEYS[0]))
    if which == "text":
        key.write_text("x")
    line = peers.read_text().splitlines()[1]
    content = {"twice": f"{line}\n\n1{line[1:]}\n", "number": f"x{line[1:]}\n", "rsa": "0 ssh-rsa AAAA\n"}.get(which)
    if content:
        peers.write_text(content)
    if which == "missing":
        peers.unlink()
    if which == "bytes":
        peers.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=sentence) as refusal:
        Identity.load(0, key, peers)
    assert "\n" not in str(refusal.value)


def test_peers_without_a_key_are_refused_by_the_command(tmp_path, capsys) -> None:
    arguments = ["--superlink", "x:1", "--client", "0", "--data", "x", "--image", "image", "--epsilon", "8"]
    assert client.main([*arguments, "--state", str(tmp_path / "s"), "--peers", str(tmp_path / "peers")]) == 2
    assert "--peers needs --key" in capsys.readouterr().err


# ---- a device


def secure(config):
    return replace(
        config, clients=3, clients_per_round=3, aggregation="secure", partition=replace(config.partition, sizes=[20] * 3)
    )


def test_a_device_without_peers_takes_part_in_no_secure_sum(made, asked) -> None:  # noqa: F811
    device = made()
    assert refusal(device(sent(secure(asked())), place())) is Reason.BEYOND_LIMITS
    assert device.account.rows == [] and "only where its owner names all clients' public keys (--peers)" in made.logs[-1]


def test_a_sum_is_answered_for_the_experiment_and_round_that_was_trained(made, asked) -> None:  # noqa: F811
    """Else a server could say another round, and another set, of the same changes."""
    device, context, config = made(), place(), secure(asked())
    device.sums = SecureSums(IDS[0], device.account.folder)
    reply = device(sent(config), context)
    assert len(reply.content[messages.ARRAYS]) == 0

    def advertise(config=config, **changes) -> Message:
        one = sent(config, "train.advertise", **changes)
        challenge = np.frombuffer(bytes(range(32)), np.uint8)
        one.content[messages.ARRAYS] = messages.record({"terms": Terms(3, 1.0, 20).to_array(), "challenge": challenge})
        return one

    other = replace(config, seed=config.seed + 1)
    for asks in (advertise(round=2), advertise(lineage="x"), advertise(other)):
        assert refusal(device(asks, context)) is Reason.OUT_OF_TURN
    answer = messages.arrays_of(device(advertise(), context).content[messages.ARRAYS])
    assert answer["signature"].shape == (96,) and answer["keys"].shape == (3, 32)
    content = {
        "clients": np.arange(3),
        "keys": np.stack([answer["keys"]] * 3),
        "signatures": np.stack([answer["signature"]] * 3),
    }
    again = messages.arrays_of(device(advertise(), context).content[messages.ARRAYS])  # without a client that was refused
    assert not np.array_equal(again["keys"], answer["keys"])
    content["keys"], content["signatures"] = np.stack([again["keys"]] * 3), np.stack([again["signature"]] * 3)
    share = sent(config, "train.share")
    share.content[messages.ARRAYS] = messages.record(content)
    refused = messages.arrays_of(device(share, context).content[messages.ARRAYS])
    assert refused["refused"].tolist() == [0, 1, 1] and set(refused) == {"refused"}


def test_devices_give_the_shares_of_one_set_only(federation, capsys) -> None:  # noqa: F811
    """A run with the same seed begins anew, and one device less stays to the end: the two sums would lay its changes open."""
    settings = KEEPING["secure"] | {"rounds": 1, "clients": 4, "clients_per_round": 4}
    edge = federation("edge", **settings)
    edge.run(capsys)
    lines = [json.loads(line) for line in (edge.folder / "state-0" / "sums.jsonl").read_text().splitlines()]
    assert [(line["round"], line["clients"]) for line in lines] == [(1, [0, 1, 2, 3])]
    (edge.results / "sums.jsonl").unlink()  # a server that does not want to know
    device = edge.device

    def without(k: int) -> Device:
        one = device(k)
        if k == 3:

            class Silent(Device):
                def __call__(self, message, context):
                    if message.metadata.message_type == "train.mask":
                        return Message(Error(2, "away"), reply_to=message)
                    return super().__call__(message, context)

            one.__class__ = Silent
        return one

    edge.device = without
    with pytest.raises((SystemExit, RunError)):
        edge.run(capsys, overwrite=True)
    reason = json.loads(edge.sent.files["summary.json"])["reason"]
    assert "only 0 of 3 answered 'unmask'" in reason
    assert len((edge.folder / "state-0" / "sums.jsonl").read_text().splitlines()) == 1


def test_a_round_that_is_taken_again_has_the_clients_that_it_had_or_ends(federation, monkeypatch, capsys) -> None:  # noqa: F811
    settings = KEEPING["secure"] | {"rounds": 2, "clients": 4, "clients_per_round": 4}
    edge = federation("edge", **settings)
    with monkeypatch.context() as patched:
        fails_after(patched, 1, "before")
        with pytest.raises(SystemExit):
            edge.run(capsys)
    device = edge.device

    def broken(k: int) -> Device:
        one = device(k)
        if k == 3:
            one.own = replace(one.own, model=("hf", "elsewhere"))  # it refuses to train
        return one

    edge.device = broken
    with pytest.raises((SystemExit, RunError)):
        edge.run(capsys)
    reason = json.loads(edge.sent.files["summary.json"])["reason"]
    assert reason.startswith("round 1 was summed over clients 0, 1, 2, 3 before the run was broken off, and client 3 has not")
    edge.device = device
    edge.run(capsys)
    assert json.loads(edge.sent.files["summary.json"])["status"] == "finished"


def test_a_state_folder_with_damaged_sets_is_refused(tmp_path) -> None:
    books = Account(tmp_path, Limits(8.0, 1e-5, 1.0, 100))
    (tmp_path / "sums.jsonl").write_text("x\n")
    with pytest.raises(ConfigError, match="which secure sums were unmasked is unknown"):
        SecureSums(IDS[0], books.folder)

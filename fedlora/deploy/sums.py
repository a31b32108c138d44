"""A device's part in a secure sum, besides the ClientApp's: it signs its keys, knows the others by theirs, and remembers.

<state>/sums.jsonl    for whom it has given shares that unmask a sum, on disk before they leave; see `fedlora.secure.sets`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.start import BEGUN, TRAINED
from fedlora.arrays import messages
from fedlora.check import RunError
from fedlora.deploy.reasons import Reason, Refused
from fedlora.secure import Identity, Sets

SUMS = "sums.jsonl"
ASKED = "asked"  # record of a client's own state: what it has trained for


class SecureSums:
    """What one device adds to the messages of secure sums."""

    def __init__(self, identity: Identity, folder: Path) -> None:
        self.identity, self.sets = identity, Sets(folder / SUMS)

    def began(self, state: RecordDict, experiment: str, round: int) -> None:
        """Note in a client's own state what it has trained for; a sum of its changes is answered under that name only."""
        state[ASKED] = _asked(experiment, round)

    def __call__(
        self,
        answer: Callable[[Message, Context], Message],
        message: Message,
        context: Context,
        experiment: str,
        round: int,
        settings: str,
    ) -> Message:
        """The reply to a message of a secure sum: that of `answer`, signed, or none where the sum must not be.

        A list of clients with keys that their peers have not signed, for this experiment and round, is answered by whose
        they are. Raises RunError before a second set of clients is unmasked, for the `settings` of the experiment and a round,
        whatever run a server says that they belong to.
        """
        if context.state.config_records.get(ASKED) != _asked(experiment, round):
            raise RunError("a secure sum is asked for of another experiment or round than this device has trained in")
        action = message.metadata.message_type.rpartition(".")[2]
        sum_ = f"{experiment}, round {round}"
        content = messages.arrays_of(message.content.array_records[messages.ARRAYS])
        if action == "share" and (strangers := self.identity.strangers(content, sum_)).any():
            record = messages.record({"refused": strangers})
            return Message(RecordDict({messages.ARRAYS: record}), reply_to=message)
        begun = _begun(context) if action == "unmask" else ""
        reply = answer(message, context)
        if action == "advertise":
            answered = messages.arrays_of(reply.content.array_records[messages.ARRAYS])
            answered["signature"] = self.identity.sign(answered["keys"], sum_)
            reply.content[messages.ARRAYS] = messages.record(answered)
        if action == "unmask":
            self.sets.note(settings, round, begun, content["alive"].tolist())
        return reply


def needed(sums: SecureSums | None) -> SecureSums:
    """Raises Refused on a device whose owner has not said who the others are."""
    if sums is None:
        reason = "this device takes part in secure sums only where its owner names all clients' public keys (--peers)"
        raise Refused(Reason.BEYOND_LIMITS, reason)
    return sums


def _asked(experiment: str, round: int) -> ConfigRecord:
    return ConfigRecord({"experiment": experiment, "round": round})


def _begun(context: Context) -> str:
    """The digest of what the client has trained from."""
    kept = context.state.array_records.get(TRAINED)
    begun = messages.arrays_of(kept).get(BEGUN) if kept is not None else None
    if begun is None:
        raise RunError("this device has trained nothing for a secure sum")
    return bytes(np.asarray(begun, np.uint8)).hex()

"""What a device answers where it does not do what it was asked: one of a few fixed sentences, nothing of its data in them."""

from __future__ import annotations

from enum import Enum

from fedlora.check import RunError

LONGEST = 500  # characters of details in a device's log, whose words may be a server's


class Reason(Enum):
    """All that a server is told. No number, no name and no value of data or message is ever put into these."""

    NOT_ANSWERED = "this device does not answer messages of this type"
    MALFORMED = "this device cannot read the message"
    NOT_AGREED = "the experiment is not the one that this device's owner agreed to"
    NOT_HELD = "the experiment is for another client, model, kind of data or classes than this device has"
    BEYOND_LIMITS = "the experiment asks for more than this device's owner allows"
    INCONSISTENT = "the message asks for something that its experiment does not say"
    OUT_OF_TURN = "no training that this message belongs to is under way on this device"
    SPENT = "this device's privacy budget does not allow it"
    OTHER_BASE = "this device's base model has other weights than the server's"
    FAILED = "it failed on this device, whose own log says why"


class Refused(RunError):
    """Work that a device does not do. Its sentence is for the device's owner; a server is told the `reason` alone."""

    def __init__(self, reason: Reason, details: str) -> None:
        super().__init__(details)
        self.reason = reason


def printable(text: str) -> str:
    """The text as one line for a terminal or a log: no control characters, at most `LONGEST` characters."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return "".join(character if character.isprintable() else " " for character in cut)

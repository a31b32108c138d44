"""A Flower Grid whose nodes are this program's own: the part that the inline and the Ray engine share."""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora import interrupt
from fedlora.check import sentence
from fedlora.engines.base import load_app

CLIENT_RAISED = 2  # Flower's error code for an exception in the ClientApp
WORKER_LOST = 8  # and for a process that died


class LocalGrid(Grid):
    """Nodes 1 … `clients`, node k being client k − 1; a subclass says how a batch of messages is executed.

    `states` holds what each client keeps for itself from one message to the next (`Context.state`), by node; a client that
    keeps nothing is not in it. It changes only with a reply: a client that is run again starts from the state it had.
    """

    own_clients = True  # replies are made by this program: sums are taken, and large cohorts added up as they come

    def __init__(self, clients: int, app: str, cohort: int | None, on_reply: Callable[[int], None]) -> None:
        self.clients, self.app, self.on_reply = clients, load_app(app), on_reply
        self.cohort: int | Mapping[str, int] | None = cohort  # clients that share a pass, or so many by what they train
        self._sent = 0
        self._replies: dict[str, Message] = {}
        self.states: dict[int, RecordDict] = {}
        # Outside a Flower process nobody has said who we are, and without that no Message can be made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self._run = Run.create_empty(run_id=1)

    @abstractmethod
    def execute(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        """Replies as they come, in any order; those not there after `timeout` seconds are left out."""

    def set_run(self, run: Run) -> None:
        """Flower's own runtime names its run here."""
        self._run = run

    @property
    def settles(self) -> bool:
        """Whether a run may say how many clients share a pass: where they can, and are its own alone."""
        return hasattr(self.app, "together")

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they are always online."""
        return range(1, self.clients + 1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's old way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Execute the messages now and keep the replies until they are pulled."""
        return [reply.metadata.reply_to_message_id for reply in self._keep(self.send_and_receive(messages))]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The kept replies to these messages; each is given once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Execute the messages and give the replies that come within `timeout` seconds, one by one as they do.

        Who a node is, it is asked here: that takes no worker.
        """
        batch = list(messages)
        for message in batch:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self._sent}"
        asking = bool(batch) and batch[0].metadata.message_type == MessageType.QUERY
        replies = self.play(batch, one_by_one=True) if asking else self.execute(batch, timeout)
        for count, reply in enumerate(replies, 1):
            interrupt.check()
            self.on_reply(count)
            yield reply

    def cohorts(self, batch: list[Message]) -> list[list[Message]]:
        """The messages by who is played together: those of training, in cohorts, where the ClientApp can do that."""
        training = bool(batch) and batch[0].metadata.message_type == MessageType.TRAIN
        if not training or self.cohort == 1 or not hasattr(self.app, "together"):
            return [[message] for message in batch]
        places = self.app.cohorts([(message, context_of(message, self.clients)) for message in batch], self.cohort)
        return [[batch[place] for place in cohort] for cohort in places]

    def states_of(self, batch: list[Message]) -> list[RecordDict | None]:
        """What the clients of these messages have kept."""
        return [self.states.get(message.metadata.dst_node_id) for message in batch]

    def play(self, batch: list[Message], one_by_one: bool = False) -> Iterator[Message]:
        """The replies to messages that are played together, here."""
        for part in [[message] for message in batch] if one_by_one else [batch]:
            yield from self.remember(*play(self.app, part, self.states_of(part), self.clients))

    def remember(self, replies: list[Message], kept: list[RecordDict | None]) -> list[Message]:
        """The replies, the clients' states with them taken over."""
        for reply, state in zip(replies, kept, strict=True):
            if state:
                self.states[reply.metadata.src_node_id] = state
            else:
                self.states.pop(reply.metadata.src_node_id, None)
        return replies

    def _keep(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            self._replies[reply.metadata.reply_to_message_id] = reply
            yield reply


def carrying(message: Message, content: RecordDict) -> Message:
    """The same message with other content; the original is left as it is."""
    other = copy.copy(message)
    other.content = content
    return other


def adds(app: Any, batch: list[Message]) -> bool:
    """Whether the ClientApp may add up its replies to these messages (`added`)."""
    return hasattr(app, "adds") and app.adds(batch[0])


def play(
    app: Any, batch: list[Message], states: list[RecordDict | None], clients: int
) -> tuple[list[Message], list[RecordDict | None]]:
    """The replies of the ClientApp, in order, and each client's state after it; several messages go to it together.

    Where that raises, each client is played by itself, so that the one to blame is the one that is named. A client that
    failed keeps the state that it had.
    """
    if len(batch) > 1:
        with contextlib.suppress(Exception):
            contexts = [context_of(message, clients, state) for message, state in zip(batch, states, strict=True)]
            replies: list[Message] = app.together(list(zip(batch, contexts, strict=True)))
            return replies, [context.state or None for context in contexts]
    played = [_call(app, message, state, clients) for message, state in zip(batch, states, strict=True)]
    return [reply for reply, _ in played], [state for _, state in played]


def _call(app: Any, message: Message, state: RecordDict | None, clients: int) -> tuple[Message, RecordDict | None]:
    """The ClientApp, run as Flower runs it; an exception in it becomes an error reply with its sentence."""
    context = context_of(message, clients, state)
    try:
        return app(message, context), context.state or None
    except Exception as error:
        return raised(message, error), state


def raised(message: Message, error: Exception) -> Message:
    """The reply of a client whose ClientApp raised, with the exception's sentence."""
    return Message(Error(CLIENT_RAISED, sentence(error)), reply_to=message)


def context_of(message: Message, clients: int, state: RecordDict | None = None) -> Context:
    """Who the ClientApp is that gets the message, with a copy of the state that it may change."""
    node = message.metadata.dst_node_id
    place = UserConfig({"partition-id": node - 1, "num-partitions": clients})
    own = RecordDict(dict(state)) if state else RecordDict()
    return Context(run_id=message.metadata.run_id, node_id=node, node_config=place, state=own, run_config=UserConfig())

"""A device's SuperNode, and the one process that does what its messages ask for.

Flower's own way is to unpack the code that the server sends, for every message anew, and to run it in a fresh process. Here
that code is neither unpacked nor run: a message goes to the program that is installed on the device, in a process that
stays, with the base model in it. So the server can ask for no more than a ClientApp's messages say, and a round costs no
start-up. The SuperNode's runtime interface is Flower's internal one, which is why the version is pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.deploy.reasons import printable

POLL = 0.2  # seconds from one look for a message to the next
RETRY = 5.0  # seconds from one try to connect to the next
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
Answer = Callable[[Message, Context], Message]  # an error reply where it fails; it does not raise


@dataclass(frozen=True)
class Connection:
    """How to reach the SuperLink, and where the SuperNode listens for this process."""

    superlink: str  # host:port
    root_certificates: Path | None  # None: those of the system
    key: Path | None  # the device's private key
    insecure: bool
    wait: float  # seconds to try a SuperLink that is out of reach, or that does not take this device yet
    port: int  # on 127.0.0.1


class Node:
    """A running SuperNode; use as a context manager. Nobody but the holder of `secret` may take its tasks."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self.connection, self.folder = connection, folder
        self.secret = secrets.token_bytes(32)
        self.address = f"127.0.0.1:{connection.port}"

    def __enter__(self) -> Node:
        file = self.folder / "runtime-secret"
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(self.secret)
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)  # less than `fedlora.app.command` gives it after Ctrl-C
        self.process.kill()

    def serve(self, answer: Answer) -> int:
        """Do what messages ask for until the SuperNode ends for good; returns its exit status.

        A SuperLink takes a device that was killed for connected until it misses its heartbeats, about a minute, and refuses it
        as it refuses a key that it does not know. So a SuperNode that ends in the first `wait` seconds is started again.
        """
        deadline = time.monotonic() + self.connection.wait
        while True:
            self._serve(answer)
            status, left = int(self.process.returncode), deadline - time.monotonic()
            if not status or left < RETRY:
                return status
            print(
                f"{self.connection.superlink} refused this device. Either its key is not registered, or the server has not yet "
                f"noticed that an earlier connection of it ended. Trying again for {left:.0f} s.",
                flush=True,
            )
            time.sleep(RETRY)
            self._start()

    def _start(self) -> None:
        file = self.folder / "runtime-secret"
        self.process = subprocess.Popen([*self._command(), "--superexec-auth-secret-file", str(file)], preexec_fn=_ends_with_us)

    def _serve(self, answer: Answer) -> None:
        """Until this SuperNode ends."""
        signing = SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods={ACQUIRE})
        with contextlib.closing(self._client(RuntimeVersionHttpInterceptor(component_name="SuperExec"), signing)) as client:
            request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
            while self.process.poll() is None:
                try:
                    task = client.AcquireTask(request)
                except httpx.HTTPError:  # it is still starting, or ending
                    task = None
                if task is not None and task.token:
                    self._perform(str(task.token), answer)
                else:
                    time.sleep(POLL)

    def _perform(self, token: str, answer: Answer) -> None:
        versioned = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        with contextlib.closing(self._client(versioned, RuntimeTokenHttpInterceptor(token))) as client:
            beat = HeartbeatSender(lambda: _alive(client))
            beat.start()
            try:
                message, context, _, _ = pull_task_input(client)  # the code that came along is left alone
                reply = answer(message, context)
                push_message(client, reply, context)
                push_task_output(client, context, "failed" if reply.has_error() else "completed", "")
            except Exception as error:  # the run was stopped meanwhile, most likely; or its bytes are no message
                print(printable(f"a message was not answered: {error}"), file=sys.stderr)  # the SuperNode does, in a minute
            finally:
                beat.stop()

    def _client(self, *interceptors: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,  # on the loopback interface
            root_certificates=None,
            interceptors=list(interceptors),
        )

    def _command(self) -> list[str]:
        about = self.connection
        command = [sys.executable, "-c", "from flwr.supernode.cli import flower_supernode; flower_supernode()"]
        command += ["--superlink", about.superlink, "--isolation", "process", "--host", "127.0.0.1", "--port", str(about.port)]
        command += ["--max-wait-time", str(about.wait)]
        if about.insecure:
            command.append("--insecure")
        if about.root_certificates:
            command += ["--root-certificates", str(about.root_certificates)]
        if about.key:
            command += ["--auth-supernode-private-key", str(about.key)]
        return command


def _alive(client: RuntimeHttpClient) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        return True
    return False


def _ends_with_us() -> None:
    """A SuperNode whose device process was killed must not wait for answers that never come (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

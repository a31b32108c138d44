"""One signal ends a command within seconds, wherever it is; and what else is to stay whole: keys, clusters of others."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from fedlora import disk, interrupt
from tests import stops
from tests.conftest import ROOT, write_digits

BUSY = 15.0  # seconds, where other tests have the cores too; `python -m tests.stops` allows 5
HEAD = """
import os, signal, subprocess, sys, threading, time
from fedlora import interrupt
from fedlora.app import command
from fedlora.interrupt import CtrlC

def ready():
    print("ready", flush=True)

def main():
{}
    return 0

sys.exit(command.run(main))
"""


@contextlib.contextmanager
def started(*lines: str, **options):
    """A command whose main function has these lines, when it has come to `ready()`."""
    code = HEAD.format(textwrap.indent("\n".join(lines), "    "))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def ended(process, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Status, output and errors after the signal; it ends soon."""
    process.send_signal(number)
    out, err = process.communicate(timeout=BUSY)
    return process.returncode, out, err


SOON = "threading.Timer(0.2, ready).start()"  # from another thread: the main one is in what follows by then
IN_C = f"import hashlib; {SOON}; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # no step of Python for an hour
IN_IMPORT = """
import importlib, tempfile
folder = tempfile.mkdtemp(); sys.path.insert(0, folder)
open(folder + "/endless.py", "w").write("import time; time.sleep(3600)")
threading.Thread(target=importlib.import_module, args=("endless",), daemon=True).start()
time.sleep(0.2); ready(); import endless
"""  # as it was with the thread that imports Ray


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("lines", ["ready(); time.sleep(3600)", IN_C, IN_IMPORT])
def test_before_there_is_anything_to_save_a_command_ends_at_once(lines, number) -> None:
    with started(lines) as process:
        name = interrupt.NAMES[number]
        assert ended(process, number) == (128 + number, "", f"stopped by {name} before a result was written\n")


@pytest.mark.parametrize("lines", [
    f"{SOON}\nwith CtrlC():\n  while True:\n    try: time.sleep(3600)\n    except KeyboardInterrupt: pass",
    f"with CtrlC():\n  {IN_C}",
])  # fmt: skip
def test_work_that_does_not_heed_a_signal_is_ended_all_the_same(lines) -> None:
    with started(lines) as process:
        assert ended(process) == (130, "", "stopped by Ctrl-C; the same command goes on after the last checkpoint\n")


SAVES = """
with CtrlC() as ctrl_c:
    try:
        ready(); time.sleep(3600)
    except KeyboardInterrupt:
        ctrl_c.later = True
        print("saving", flush=True)
        time.sleep({})
        print("saved", interrupt.reason())
"""


def test_saving_is_waited_for_and_a_signal_that_is_sent_twice_is_one() -> None:
    with started(SAVES.format(5)) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        told = "saving what there is; a second signal ends this at once\n"
        assert ended(process, signal.SIGTERM) == (143, "saving\nsaved stopped by SIGTERM\n", told)


def test_a_second_signal_ends_saving_at_once() -> None:
    with started(SAVES.format(3600)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        time.sleep(1.2)
        assert ended(process) == (130, "", "stopped by Ctrl-C, and by a second signal before all was saved\n")


def test_whatever_the_command_started_ends_with_it() -> None:
    """A child in a session of its own that heeds nothing, and a child of that."""
    deaf = "import signal, subprocess, sys, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; "
    child = deaf + "subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print('up', flush=True); time.sleep(3600)"
    start = f"child = subprocess.Popen([sys.executable, '-c', {child!r}, {deaf + 'time.sleep(3600)'!r}], start_new_session=True"
    with started(f"{start}, stdout=subprocess.PIPE)", "child.stdout.readline(); ready(); time.sleep(3600)") as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        assert ended(process, signal.SIGTERM)[0] == 143
        assert not psutil.wait_procs(family, timeout=BUSY)[1]


LEFT_TO_DO = """
class Late:
    def __del__(self, ready=ready, sleep=time.sleep):
        ready(); sleep(1)
sys.modules["__main__"].late = Late()
"""  # for the interpreter, when the work is done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_interpreter_ends_changes_nothing(number) -> None:
    with started(LEFT_TO_DO) as process:
        assert ended(process, number) == (0, "", "")


@pytest.mark.parametrize("place", ["main", "thread"])
def test_handlers_that_a_library_sets_are_put_back(place) -> None:
    """As Ray does: in Python where it is started in the main thread, in C++ anywhere."""
    theirs = {"main": "signal.signal(15, lambda *_: os._exit(1))", "thread": "ctypes.CDLL(None).signal(15, 0)"}[place]
    lines = f"import ctypes\ndef start():\n  with interrupt.kept():\n    {theirs}\n    time.sleep(0.1)\n"
    run = {"main": "start()", "thread": "thread = threading.Thread(target=start); thread.start(); thread.join()"}[place]
    with started(lines + run, "ready(); time.sleep(3600)") as process:
        assert ended(process, signal.SIGTERM) == (143, "", "stopped by SIGTERM before a result was written\n")


def test_a_pipe_whose_reader_has_gone_hinders_nothing(tmp_path) -> None:
    """`run.py | tee log`: Ctrl-C ends tee too."""
    lines = SAVES.format(0) + f"        print('x' * 100_000, flush=True); open({str(tmp_path / 'saved')!r}, 'w').close()"
    with started(lines) as process:
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(BUSY) == 130 and process.stderr.read() == "" and (tmp_path / "saved").exists()


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with started("ready(); time.sleep(1); print('done')") as process:
            assert ended(process, signal.SIGHUP) == (0, "done\n", "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_status_of_a_command_that_is_done_stands() -> None:
    lines = "import atexit; atexit.register(lambda: (ready(), time.sleep(1)))"
    with started(lines) as process:
        assert ended(process) == (0, "", "")


def test_what_is_held_is_done_whole() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt.CtrlC() as ctrl_c:
        with ctrl_c.held():
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("and more")
    assert done == ["whole"]


def test_a_file_that_ctrl_c_cuts_off_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch) -> None:
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    disk.write(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk.write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


QUICK = [
    stops.Moment("inline", "watched", 0.1, signal.SIGTERM),
    stops.Moment("inline", "9", 0.05, signal.SIGTERM),
    stops.Moment("ray", "watched", 1.0),
    stops.Moment("ray", "ray", 0.2),
    stops.Moment("ray", "3", 0.0, signal.SIGTERM, stops.SWEPT),
    stops.Moment("flower", "1"),
]


@pytest.mark.parametrize("moment", QUICK, ids=lambda moment: f"{moment.engine}-{moment.event}")
def test_one_signal_ends_a_run_or_a_sweep_with_what_there_is(moment, tmp_path) -> None:
    """Six moments; `python -m tests.stops` has forty."""
    assert len(stops.MOMENTS) == 40
    assert stops.tried(moment, tmp_path, limit=BUSY)[1] == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_device_that_is_stopped_ends_with_0_and_so_does_its_supernode(tmp_path, number) -> None:
    """As systemd does it; the SuperLink is out of reach, and the SuperNode keeps trying."""
    write_digits(tmp_path, 1, each=12)
    command = [sys.executable, "-c", "import sys; from fedlora.tools import start; sys.exit(start.client())"]
    command += ["--superlink", "127.0.0.1:9", "--insecure", "--client", "0", "--data", str(tmp_path / "device-0.jsonl")]
    command += ["--image", "image", "--device", "cpu", "--epsilon", "1", "--state", str(tmp_path / "state"), "--wait", "600"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        assert any(line.startswith("connecting to ") for line in process.stdout)
        deadline = time.monotonic() + BUSY
        while not (family := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(BUSY) == 0 and family
    assert not psutil.wait_procs(family, timeout=BUSY)[1]


def test_certificates_for_one_more_device_change_nothing_of_the_others(tmp_path) -> None:
    def make(*devices: str, host: str = "127.0.0.1") -> subprocess.CompletedProcess[str]:
        script = ROOT / "examples" / "edge" / "certificates.sh"
        return subprocess.run([script, tmp_path / "keys", host, *devices], capture_output=True, text=True)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()}

    assert make("a", "b").returncode == 0
    first = files()
    assert set(first) == {"ca.crt", "ca.key", "server.pem", "server.key", "peers", "a", "a.pub", "b", "b.pub"}
    for devices in (("a", "b", "c"), ("d",), ("a",)):
        assert make(*devices).returncode == 0
    last = files()
    assert set(last) - set(first) == {"c", "c.pub", "d", "d.pub"}
    assert all(last[name] == content for name, content in first.items() if name != "peers")
    lines = last["peers"].decode().splitlines()
    keys = [" ".join((last[f"{name}.pub"].decode()).split()[:2]) for name in "abcd"]
    assert [line.rsplit(" ", 1)[0] for line in lines] == [f"{number} {key}" for number, key in enumerate(keys)]
    assert last["peers"].startswith(first["peers"])
    for refused in (make("ca.key"), make("e", host="10.0.0.1"), make("../e")):
        assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert files() == last
    checked = ["openssl", "verify", "-CAfile", tmp_path / "keys" / "ca.crt", tmp_path / "keys" / "server.pem"]
    assert subprocess.run(checked, capture_output=True).returncode == 0


def test_no_ray_that_the_docs_start_reports_its_use() -> None:
    commands = [
        (page.name, command)
        for page in [*Path(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
        for command in re.findall(r"^.*ray start --(?:head|address).*$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if "|" not in command
    ]
    assert len(commands) >= 4
    assert [each for each in commands if "--disable-usage-stats" not in each[1]] == []

"""Engines that we start ourselves: real processes, some of which do not want to go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import psutil
import pytest

from backends.processes import supervised as process
from backends.processes.supervised import StartFailed, StopFailed, Supervised

#: Says that it is there, and stays.
PLAIN = "import time; print('ready', flush=True); time.sleep(600)"

#: Says goodbye when it is asked to go.
POLITE = """
import signal, sys, time
def leave(*_):
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""

#: Does not listen.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""

#: As engines do, has a process of its own; that one has no parent and another session.
BROOD = """
import os, signal, time
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    print("ready", flush=True)
time.sleep(600)
"""

#: The same, and what hides there does not listen.
DEAF_BROOD = BROOD.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")

#: A gateway, as far as it matters here.
GATEWAY = """
import asyncio, sys
from pathlib import Path
from backends.processes.supervised import Supervised

async def main():
    engine = Supervised([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]))
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


class Bench:
    """Engines under test, and the means to find whatever is left of them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.mark = uuid.uuid4().hex  # all that descends from an engine has it, and its keepers
        self._engines: list[Supervised] = []

    def engine(self, program: str, *, tells_url: bool = False) -> Supervised:
        """An engine that is a Python program."""
        return self.command(sys.executable, "-u", "-c", program, tells_url=tells_url)

    def command(self, *command: str, tells_url: bool = False, **environment: str) -> Supervised:
        environment["MARK"] = self.mark
        self._engines.append(Supervised(command, self.log, environment, tells_url=tells_url))
        return self._engines[-1]

    async def running(self, program: str) -> Supervised:
        """The same, when it has said that it is ready."""
        engine = self.engine(program)
        said = self.said()
        await engine.start()
        await until(lambda: "ready" in self.said().removeprefix(said))
        return engine

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def left(self) -> list[psutil.Process]:
        """All processes that are there because of these engines, the keepers included."""
        return [one for one in psutil.process_iter() if self._is_ours(one)]

    def _is_ours(self, one: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return one.environ().get("MARK") == self.mark
        return False

    async def close(self) -> None:
        try:
            for engine in self._engines:
                await engine.stop(0)
            assert self.left() == []
        finally:
            for one in self.left():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "engine.log")
    yield bench
    await bench.close()


@pytest.fixture
def long_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine, a program that ends has ended within it."""
    monkeypatch.setattr(process, "MOMENT_S", 30.0)


async def until(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Return when the condition holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


def kill(victims: Iterable[int]) -> None:
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def inner(outer: int) -> int:
    """The keeper's keeper."""
    (found,) = psutil.Process(outer).children()
    return found.pid


def state(engine: Supervised) -> str:
    running, wanted = "" if engine.running else "not ", "" if engine.wanted else "not "
    return f"{running}running, {wanted}wanted"


def program_of(engine: Supervised) -> psutil.Process:
    """The engine itself, below its keepers."""
    assert engine.pid is not None
    return psutil.Process(inner(engine.pid)).children()[0]


# Its life


async def test_it_runs_until_it_is_stopped(bench: Bench) -> None:
    engine = bench.engine(PLAIN)
    before = state(engine)
    await engine.start()
    during, pid = state(engine), engine.pid
    there = [one.pid for one in bench.left()]
    await engine.stop()

    assert before == state(engine) == "not running, not wanted"
    assert during == "running, wanted"
    assert pid in there
    assert engine.pid is None
    assert bench.left() == []


async def test_it_may_be_started_and_stopped_any_number_of_times(bench: Bench) -> None:
    engine = bench.engine(PLAIN)
    pids = set()
    for _ in range(3):
        await engine.start()
        pids.add(engine.pid)
        await engine.start()
        pids.add(engine.pid)
        await engine.stop()
        await engine.stop()

    assert len(pids) == 3
    dated = [line for line in bench.said().splitlines() if line.startswith("--- 20")]
    assert len(dated) == 3
    assert dated[0].endswith(f"starting {sys.executable}")


async def test_stopping_what_was_never_started_is_nothing(bench: Bench) -> None:
    engine = bench.engine(PLAIN)
    await engine.stop()

    assert engine.last_words() == f"nothing in {bench.log}"


async def test_what_it_says_on_either_stream_is_kept(bench: Bench) -> None:
    engine = await bench.running(
        "import sys, time; sys.stderr.write('oh\\n'); print('ready'); time.sleep(600)"
    )

    assert bench.said().endswith("oh\nready\n")
    assert engine.last_words() == f"{bench.log} ends with:\noh\nready"
    assert bench.log.stat().st_mode & 0o777 == 0o600


async def test_ctrl_c_reaches_the_gateway_alone(bench: Bench) -> None:
    await bench.running(BROOD)
    sessions = {os.getsid(one.pid) for one in bench.left()}

    assert len(sessions) == 3  # the keepers', the engine's, and that of what hides
    assert os.getsid(0) not in sessions


async def test_it_gets_our_environment_but_none_of_our_settings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOLANE_API_KEYS", '["our-secret"]')
    monkeypatch.setenv("OF_THE_MACHINE", "seen")
    show = "import os, time; print(os.environ, 'ready'); time.sleep(600)"
    engine = bench.command(sys.executable, "-uc", show, OF_THE_ENGINE="seen, too")
    await engine.start()
    await until(lambda: "ready" in bench.said())

    assert "'OF_THE_MACHINE': 'seen'" in bench.said()
    assert "'OF_THE_ENGINE': 'seen, too'" in bench.said()
    assert "our-secret" not in bench.said()


async def test_it_inherits_no_open_file_of_ours(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    os.set_blocking(reader, False)
    await bench.running(PLAIN)
    os.close(writer)

    assert os.read(reader, 1) == b""  # the end: nobody else has it
    os.close(reader)


@pytest.mark.usefixtures("long_moment")
async def test_signals_that_python_ignores_are_not_ignored_by_it(bench: Bench) -> None:
    with pytest.raises(StartFailed, match=r"SigIgn:\s+[0-9a-f]+$") as ended:
        await bench.command("grep", "SigIgn", "/proc/self/status").start()
    ignored = int(str(ended.value).split()[-1], 16)

    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


# Starts that fail


async def test_a_program_that_is_not_there_does_not_start(bench: Bench) -> None:
    engine = bench.command("no-such-program", "--api-key", "a-secret")

    with pytest.raises(StartFailed) as failed:
        await engine.start()
    assert str(failed.value) == (
        f"no-such-program does not start: ended with status 127; {bench.log} ends with:\n"
        "cannot run no-such-program: No such file or directory"
    )
    assert state(engine) == "not running, not wanted"
    assert "a-secret" not in bench.said()


async def test_a_program_that_may_not_be_run_does_not_start(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")

    with pytest.raises(StartFailed, match=r"cannot run .*/text: Permission denied"):
        await bench.command(str(tmp_path / "text")).start()


@pytest.mark.usefixtures("long_moment")
async def test_one_that_ends_at_once_shows_the_end_of_what_it_said(bench: Bench) -> None:
    talk = "print('the first line')\nfor i in range(5000): print(f'{i} is a number')\n"
    failing = bench.engine(talk + "print('\\33[31mno\\33[0m memory\\7'); raise SystemExit(3)")

    with pytest.raises(StartFailed) as failed:
        await failing.start()
    said = str(failed.value)
    assert "does not start: ended with status 3; " in said
    assert said.endswith("\n4999 is a number\nno memory")
    assert "the first line" not in said
    assert len(said) < 1500


@pytest.mark.usefixtures("long_moment")
async def test_what_it_said_before_its_last_start_is_not_shown(bench: Bench) -> None:
    with pytest.raises(StartFailed, match="of old"):
        await bench.engine("raise SystemExit('of old')").start()
    with pytest.raises(StartFailed) as failed:
        await bench.engine("import os; os.kill(os.getpid(), 9)").start()

    assert str(failed.value).endswith(f"does not start: ended by signal 9; nothing in {bench.log}")


@pytest.mark.usefixtures("long_moment")
async def test_a_log_that_was_cut_off_meanwhile_is_shown_all_the_same(bench: Bench) -> None:
    bench.log.write_text("long ago\n" * 1000)
    cut = f"import os; os.truncate({str(bench.log)!r}, 0); raise SystemExit('just now')"

    with pytest.raises(StartFailed) as failed:
        await bench.engine(cut).start()
    assert str(failed.value).endswith(f"{bench.log} ends with:\njust now")


async def test_a_log_that_cannot_be_written_stops_the_start(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench.log = tmp_path / "file" / "engine.log"

    with pytest.raises(StartFailed, match=rf"cannot write the log {bench.log}: .+"):
        await bench.engine(PLAIN).start()


async def test_a_start_that_is_given_up_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = bench.engine(BROOD)
    with monkeypatch.context() as patch:
        patch.setattr(process, "MOMENT_S", 600.0)
        starting = asyncio.create_task(engine.start())
        await until(lambda: "ready" in bench.said())
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    assert not engine.wanted
    await until(lambda: not engine.running)
    assert bench.left() == []
    await engine.start()
    assert engine.running


# Those that tell their URL


async def test_one_that_tells_its_url_has_started_when_it_has(bench: Bench) -> None:
    engine = bench.engine("import sys; print('http://x:1'); sys.stdin.read()", tells_url=True)
    await engine.start(deadline_s=60)
    assert (engine.url, engine.running) == ("http://x:1", True)

    await engine.stop()
    assert bench.left() == []


async def test_one_that_tells_its_url_too_late_is_ended(bench: Bench) -> None:
    silent = bench.engine("import time; time.sleep(600)", tells_url=True)

    with pytest.raises(StartFailed, match=r"no word within 0\.1 s"):
        await silent.start(deadline_s=0.1)
    assert state(silent) == "not running, not wanted"
    assert bench.left() == []


@pytest.mark.parametrize("program", ["print('hello'); input()", "print('x' * 10**6); input()"])
async def test_one_that_says_something_else_is_ended(bench: Bench, program: str) -> None:
    with pytest.raises(StartFailed, match="does not start"):
        await bench.engine(program, tells_url=True).start(deadline_s=60)
    assert bench.left() == []


async def test_one_that_ends_before_it_tells_its_url_shows_its_log(bench: Bench) -> None:
    with pytest.raises(StartFailed, match=r"status 1; .*\nno model$"):
        await bench.engine("raise SystemExit('no model')", tells_url=True).start(deadline_s=60)


# Stops


async def test_it_is_asked_to_go_before_it_is_killed(bench: Bench) -> None:
    engine = await bench.running(POLITE)
    await engine.stop(30)

    assert bench.said().endswith("ready\nbye\n")
    assert engine.last_words().startswith("ended with status 0; ")


async def test_one_that_does_not_listen_is_killed_after_its_grace(bench: Bench) -> None:
    engine = await bench.running(DEAF)
    began = time.monotonic()
    await engine.stop(0.5)

    assert time.monotonic() - began >= 0.5
    assert engine.last_words().startswith("ended by signal 9; ")
    assert bench.left() == []


async def test_a_stop_ends_what_hides_too(bench: Bench) -> None:
    engine = await bench.running(DEAF_BROOD)
    there = bench.left()
    await engine.stop(0.2)

    assert len(there) >= 4  # two keepers, the engine, and that
    assert bench.left() == []


async def test_what_outlives_its_engine_is_asked_to_go_before_it_is_killed(bench: Bench) -> None:
    engine = await bench.running("import os, time\nif os.fork(): time.sleep(600)\n" + POLITE)
    await engine.stop(30)

    assert bench.said().endswith("ready\nbye\n")


async def test_a_stop_that_is_given_up_happens_all_the_same(bench: Bench) -> None:
    engine = await bench.running(DEAF)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await engine.stop(0.5)

    await until(lambda: not engine.running)
    assert bench.left() == []


async def test_what_cannot_be_ended_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "KILLED_S", 0.1)
    engine = await bench.running(PLAIN)
    assert engine.pid is not None
    keepers = [psutil.Process(engine.pid), psutil.Process(inner(engine.pid))]
    for keeper in keepers:
        keeper.suspend()  # stands for a process that a driver holds

    with pytest.raises(StopFailed, match=f"still there, below process {engine.pid}"):
        await engine.stop(0.1)
    assert engine.running
    for keeper in keepers:
        keeper.resume()
    await until(lambda: not engine.running)


# Deaths


async def test_its_death_is_noticed_and_it_can_be_started_again(bench: Bench) -> None:
    engine = await bench.running(PLAIN)
    ended = asyncio.Event()
    engine.on_end = ended.set
    program_of(engine).kill()
    async with asyncio.timeout(30):
        await ended.wait()

    assert state(engine) == "not running, wanted"
    assert engine.last_words() == f"ended by signal 9; {bench.log} ends with:\nready"
    await engine.start()
    assert state(engine) == "running, wanted"


async def test_an_engine_that_dies_takes_what_it_started_with_it(bench: Bench) -> None:
    engine = await bench.running(DEAF_BROOD)
    program_of(engine).kill()
    await until(lambda: not engine.running)

    assert bench.left() == []


async def test_an_engine_that_kills_its_own_group_does_not_meet_its_keepers(bench: Bench) -> None:
    engine = await bench.running(BROOD)
    os.killpg(program_of(engine).pid, signal.SIGKILL)
    await until(lambda: not engine.running)

    assert bench.left() == []
    assert engine.last_words().startswith("ended by signal 9; ")


@pytest.mark.parametrize("victim", ["outer", "inner"])
async def test_a_killed_keeper_leaves_nothing(bench: Bench, victim: str) -> None:
    engine = await bench.running(BROOD)
    assert engine.pid is not None
    kill([engine.pid if victim == "outer" else inner(engine.pid)])
    await until(lambda: not engine.running)

    assert bench.left() == []
    assert engine.wanted
    await engine.start()
    assert engine.running


@pytest.mark.parametrize("beside", ["nobody", "outer", "inner", "engine"])
async def test_a_killed_gateway_leaves_nothing(bench: Bench, beside: str) -> None:
    gateway = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", GATEWAY, DEAF_BROOD if beside == "nobody" else BROOD),
        str(bench.log),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"MARK": bench.mark},
    )
    assert gateway.stdout is not None
    outer = int(await gateway.stdout.readline())
    await until(lambda: "ready" in bench.said())
    keeper = inner(outer)
    program = psutil.Process(keeper).children()[0].pid
    too = {"nobody": [], "outer": [outer], "inner": [keeper], "engine": [program]}
    kill([gateway.pid, *too[beside]])
    await gateway.wait()

    await until(lambda: not bench.left())


async def test_a_keeper_that_is_asked_to_go_takes_its_engine_with_it(bench: Bench) -> None:
    engine = await bench.running(POLITE)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGTERM)
    await until(lambda: not engine.running)

    assert bench.said().endswith("bye\n")
    assert bench.left() == []


# Kept running


async def test_what_is_kept_is_started_again_whenever_it_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "FIRST_PAUSE_S", 0.01)
    engine = bench.engine(PLAIN)
    keeping = asyncio.create_task(engine.keep())
    await until(lambda: engine.wanted and engine.running)
    first = engine.pid
    for one in bench.left():
        one.kill()

    await until(lambda: engine.running and engine.pid != first)

    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await engine.stop()
    assert bench.left() == []


async def test_between_starts_that_fail_there_is_a_pause_that_grows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(process, "LONGEST_PAUSE_S", 0.04)
    keeping = asyncio.create_task(bench.command("no-such-program").keep())

    await until(lambda: len(caplog.messages) >= 4)

    keeping.cancel()
    pauses = [message.partition(" in ")[2].partition(" s:")[0] for message in caplog.messages[:4]]
    assert pauses == ["0.01", "0.02", "0.04", "0.04"]

"""Engine processes that the gateway starts: real ones, some of which ignore SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import psutil
import pytest

from backends.processes.supervised import ProcessTimings, StartFailed, StopFailed, Supervised
from tests.support.waiting import until

#: Prints that it runs, and stays.
PLAIN = "import time; print('ready', flush=True); time.sleep(600)"

#: Prints a last line on SIGTERM, and ends.
POLITE = """
import signal, sys, time
def leave(*_):
    print("bye", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""

#: Ignores SIGTERM.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""

#: Starts a process, as engines do; that one has no parent, and a session of its own.
BROOD = """
import os, signal, time
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    print("ready", flush=True)
time.sleep(600)
"""

#: The same, and the hidden process ignores SIGTERM.
DEAF_BROOD = BROOD.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")

#: A program that starts an engine, in place of the gateway.
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


USUAL = ProcessTimings()
#: However busy the machine, a program that ends at once has ended within `settle_s`.
PATIENT = ProcessTimings(settle_s=30.0)


class Bench:
    """Engines under test, and the means to find their processes."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.mark = uuid.uuid4().hex  # a variable of keepers, engines and their descendants
        self._engines: list[Supervised] = []

    def engine(
        self, program: str, *, reports_url: bool = False, timings: ProcessTimings = USUAL
    ) -> Supervised:
        """An engine that is a Python program."""
        command = (sys.executable, "-u", "-c", program)
        return self.command(*command, reports_url=reports_url, timings=timings)

    def command(
        self,
        *command: str,
        reports_url: bool = False,
        timings: ProcessTimings = USUAL,
        **environment: str,
    ) -> Supervised:
        environment["MARK"] = self.mark
        engine = Supervised(
            command, self.log, environment, reports_url=reports_url, timings=timings
        )
        self._engines.append(engine)
        return engine

    async def running(self, program: str, timings: ProcessTimings = USUAL) -> Supervised:
        """An engine that has printed that it is ready."""
        engine = self.engine(program, timings=timings)
        before = self.output()
        await engine.start()
        await until(lambda: "ready" in self.output().removeprefix(before))
        return engine

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """All processes of these engines that run, their keepers included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get("MARK") == self.mark
        return False

    async def close(self) -> None:
        try:
            for engine in self._engines:
                await engine.stop(0)
            assert self.processes() == []
        finally:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "engine.log")
    yield bench
    await bench.close()


def kill(victims: Iterable[int]) -> None:
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def inner(outer: int) -> int:
    """The inner keeper."""
    (found,) = psutil.Process(outer).children()
    return found.pid


def state(engine: Supervised) -> str:
    running, wanted = "" if engine.running else "not ", "" if engine.wanted else "not "
    return f"{running}running, {wanted}wanted"


def program_of(engine: Supervised) -> psutil.Process:
    """The engine itself, below its keepers."""
    assert engine.pid is not None
    return psutil.Process(inner(engine.pid)).children()[0]


# Start and stop


async def test_an_engine_runs_until_it_is_stopped(bench: Bench) -> None:
    engine = bench.engine(PLAIN)
    before = state(engine)
    await engine.start()
    during, pid = state(engine), engine.pid
    running = [process.pid for process in bench.processes()]
    await engine.stop()

    assert before == state(engine) == "not running, not wanted"
    assert during == "running, wanted"
    assert pid in running
    assert engine.pid is None
    assert bench.processes() == []


async def test_an_engine_can_be_started_and_stopped_any_number_of_times(bench: Bench) -> None:
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
    dated = [line for line in bench.output().splitlines() if line.startswith("--- 20")]
    assert len(dated) == 3
    assert dated[0].endswith(f"starting {sys.executable}")


async def test_stopping_an_engine_that_never_started_does_nothing(bench: Bench) -> None:
    engine = bench.engine(PLAIN)
    await engine.stop()

    assert engine.exit_report() == f"nothing in {bench.log}"


async def test_stdout_and_stderr_are_both_logged(bench: Bench) -> None:
    engine = await bench.running(
        "import sys, time; sys.stderr.write('oh\\n'); print('ready'); time.sleep(600)"
    )

    assert bench.output().endswith("oh\nready\n")
    assert engine.exit_report() == f"{bench.log} ends with:\noh\nready"
    assert bench.log.stat().st_mode & 0o777 == 0o600


async def test_ctrl_c_reaches_the_gateway_alone(bench: Bench) -> None:
    await bench.running(BROOD)
    sessions = {os.getsid(process.pid) for process in bench.processes()}

    assert len(sessions) == 3  # of the keepers, the engine, and the hidden process
    assert os.getsid(0) not in sessions


async def test_an_engine_inherits_our_environment_without_our_settings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOLANE_API_KEYS", '["our-secret"]')
    monkeypatch.setenv("OF_THE_MACHINE", "read")
    show = "import os, time; print(os.environ, 'ready'); time.sleep(600)"
    engine = bench.command(sys.executable, "-uc", show, OF_THE_ENGINE="read, too")
    await engine.start()
    await until(lambda: "ready" in bench.output())

    assert "'OF_THE_MACHINE': 'read'" in bench.output()
    assert "'OF_THE_ENGINE': 'read, too'" in bench.output()
    assert "our-secret" not in bench.output()


async def test_an_engine_inherits_no_open_file(bench: Bench) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    os.set_blocking(reader, False)
    await bench.running(PLAIN)
    os.close(writer)

    assert os.read(reader, 1) == b""  # the end: no other process has it
    os.close(reader)


async def test_signals_that_python_ignores_reach_the_engine(bench: Bench) -> None:
    with pytest.raises(StartFailed, match=r"SigIgn:\s+[0-9a-f]+$") as ended:
        await bench.command("grep", "SigIgn", "/proc/self/status", timings=PATIENT).start()
    ignored = int(str(ended.value).split()[-1], 16)

    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


# Starts that fail


async def test_a_program_that_does_not_exist_does_not_start(bench: Bench) -> None:
    engine = bench.command("no-such-program", "--api-key", "a-secret")

    with pytest.raises(StartFailed) as failed:
        await engine.start()
    assert str(failed.value) == (
        f"no-such-program does not start: ended with status 127; {bench.log} ends with:\n"
        "cannot run no-such-program: No such file or directory"
    )
    assert state(engine) == "not running, not wanted"
    assert "a-secret" not in bench.output()


async def test_a_file_that_is_not_executable_does_not_start(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")

    with pytest.raises(StartFailed, match=r"cannot run .*/text: Permission denied"):
        await bench.command(str(tmp_path / "text")).start()


async def test_a_failed_start_shows_the_end_of_the_log(bench: Bench) -> None:
    talk = "print('the first line')\nfor i in range(5000): print(f'{i} is a number')\n"
    last = "print('\\33[31mno\\33[0m memory\\7'); raise SystemExit(3)"
    failing = bench.engine(talk + last, timings=PATIENT)

    with pytest.raises(StartFailed) as failed:
        await failing.start()
    text = str(failed.value)
    assert "does not start: ended with status 3; " in text
    assert text.endswith("\n4999 is a number\nno memory")
    assert "the first line" not in text
    assert len(text) < 1500


async def test_a_failed_start_shows_nothing_of_the_start_before(bench: Bench) -> None:
    with pytest.raises(StartFailed, match="of old"):
        await bench.engine("raise SystemExit('of old')", timings=PATIENT).start()
    with pytest.raises(StartFailed) as failed:
        await bench.engine("import os; os.kill(os.getpid(), 9)", timings=PATIENT).start()

    assert str(failed.value).endswith(f"does not start: ended by signal 9; nothing in {bench.log}")


async def test_a_log_that_was_rotated_meanwhile_is_shown_from_its_beginning(bench: Bench) -> None:
    bench.log.write_text("long ago\n" * 1000)
    cut = f"import os; os.truncate({str(bench.log)!r}, 0); raise SystemExit('just now')"

    with pytest.raises(StartFailed) as failed:
        await bench.engine(cut, timings=PATIENT).start()
    assert str(failed.value).endswith(f"{bench.log} ends with:\njust now")


async def test_a_log_that_cannot_be_written_stops_the_start(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench.log = tmp_path / "file" / "engine.log"

    with pytest.raises(StartFailed, match=rf"cannot write the log {bench.log}: .+"):
        await bench.engine(PLAIN).start()


async def test_a_cancelled_start_leaves_no_process(bench: Bench) -> None:
    engine = bench.engine(BROOD, timings=ProcessTimings(settle_s=600.0))

    for _ in range(2):
        before = bench.output()
        starting = asyncio.create_task(engine.start())
        await until(lambda: bench.output().count("ready") > before.count("ready"))  # noqa: B023
        assert engine.running
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not engine.wanted
        await until(lambda: not engine.running)
        assert bench.processes() == []


# Engines that report their URL


async def test_an_engine_that_reports_its_url_has_started_when_it_did(bench: Bench) -> None:
    engine = bench.engine("import sys; print('http://x:1'); sys.stdin.read()", reports_url=True)
    await engine.start(deadline_s=60)
    assert (engine.url, engine.running) == ("http://x:1", True)

    await engine.stop()
    assert bench.processes() == []


async def test_an_engine_that_reports_its_url_too_late_is_ended(bench: Bench) -> None:
    silent = bench.engine("import time; time.sleep(600)", reports_url=True)

    with pytest.raises(StartFailed, match=r"no URL within 0\.1 s"):
        await silent.start(deadline_s=0.1)
    assert state(silent) == "not running, not wanted"
    assert bench.processes() == []


@pytest.mark.parametrize("program", ["print('hello'); input()", "print('x' * 10**6); input()"])
async def test_an_engine_that_reports_no_url_is_ended(bench: Bench, program: str) -> None:
    with pytest.raises(StartFailed, match="does not start"):
        await bench.engine(program, reports_url=True).start(deadline_s=60)
    assert bench.processes() == []


async def test_an_engine_that_ends_before_it_reports_its_url_shows_its_log(bench: Bench) -> None:
    with pytest.raises(StartFailed, match=r"status 1; .*\nno model$"):
        await bench.engine("raise SystemExit('no model')", reports_url=True).start(deadline_s=60)


# Stops


async def test_a_stop_sends_sigterm_before_sigkill(bench: Bench) -> None:
    engine = await bench.running(POLITE)
    await engine.stop(30)

    assert bench.output().endswith("ready\nbye\n")
    assert engine.exit_report().startswith("ended with status 0; ")


async def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(bench: Bench) -> None:
    engine = await bench.running(DEAF)
    began = time.monotonic()
    await engine.stop(0.5)

    assert time.monotonic() - began >= 0.5
    assert engine.exit_report().startswith("ended by signal 9; ")
    assert bench.processes() == []


async def test_a_stop_ends_hidden_processes_too(bench: Bench) -> None:
    engine = await bench.running(DEAF_BROOD)
    before = bench.processes()
    await engine.stop(0.2)

    assert len(before) >= 4  # two keepers, the engine, and the hidden process
    assert bench.processes() == []


async def test_a_process_that_outlives_its_engine_receives_sigterm_before_sigkill(
    bench: Bench,
) -> None:
    engine = await bench.running("import os, time\nif os.fork(): time.sleep(600)\n" + POLITE)
    await engine.stop(30)

    assert bench.output().endswith("ready\nbye\n")


async def test_a_cancelled_stop_happens_all_the_same(bench: Bench) -> None:
    engine = await bench.running(DEAF)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await engine.stop(0.5)

    await until(lambda: not engine.running)
    assert bench.processes() == []


async def test_a_process_that_cannot_be_ended_is_reported(bench: Bench) -> None:
    engine = await bench.running(PLAIN, ProcessTimings(killed_s=0.1))
    assert engine.pid is not None
    keepers = [psutil.Process(engine.pid), psutil.Process(inner(engine.pid))]
    for keeper in keepers:
        keeper.suspend()  # stands for a process that a driver holds

    with pytest.raises(StopFailed, match=f"still runs, below process {engine.pid}"):
        await engine.stop(0.1)
    assert engine.running
    for keeper in keepers:
        keeper.resume()
    await until(lambda: not engine.running)


# Deaths


async def test_an_engine_that_died_can_be_started_again(bench: Bench) -> None:
    engine = await bench.running(PLAIN)
    ended = asyncio.Event()
    engine.on_end = ended.set
    program_of(engine).kill()
    async with asyncio.timeout(30):
        await ended.wait()

    assert state(engine) == "not running, wanted"
    assert engine.exit_report() == f"ended by signal 9; {bench.log} ends with:\nready"
    await engine.start()
    assert state(engine) == "running, wanted"


async def test_an_engine_that_dies_leaves_no_process(bench: Bench) -> None:
    engine = await bench.running(DEAF_BROOD)
    program_of(engine).kill()
    await until(lambda: not engine.running)

    assert bench.processes() == []


async def test_an_engine_that_kills_its_process_group_does_not_kill_its_keepers(
    bench: Bench,
) -> None:
    engine = await bench.running(BROOD)
    os.killpg(program_of(engine).pid, signal.SIGKILL)
    await until(lambda: not engine.running)

    assert bench.processes() == []
    assert engine.exit_report().startswith("ended by signal 9; ")


@pytest.mark.parametrize("victim", ["outer", "inner"])
async def test_a_killed_keeper_leaves_no_process(bench: Bench, victim: str) -> None:
    engine = await bench.running(BROOD)
    assert engine.pid is not None
    kill([engine.pid if victim == "outer" else inner(engine.pid)])
    await until(lambda: not engine.running)

    assert bench.processes() == []
    assert engine.wanted
    await engine.start()
    assert engine.running


@pytest.mark.parametrize("beside", ["nobody", "outer", "inner", "engine"])
async def test_a_killed_gateway_leaves_no_process(bench: Bench, beside: str) -> None:
    gateway = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", GATEWAY, DEAF_BROOD if beside == "nobody" else BROOD),
        str(bench.log),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"MARK": bench.mark},
    )
    assert gateway.stdout is not None
    outer = int(await gateway.stdout.readline())
    await until(lambda: "ready" in bench.output())
    keeper = inner(outer)
    program = psutil.Process(keeper).children()[0].pid
    too = {"nobody": [], "outer": [outer], "inner": [keeper], "engine": [program]}
    kill([gateway.pid, *too[beside]])
    await gateway.wait()

    await until(lambda: not bench.processes())


async def test_sigterm_to_a_keeper_ends_its_engine(bench: Bench) -> None:
    engine = await bench.running(POLITE)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGTERM)
    await until(lambda: not engine.running)

    assert bench.output().endswith("bye\n")
    assert bench.processes() == []


# Kept running


async def test_an_engine_that_is_kept_running_is_started_again_whenever_it_ends(
    bench: Bench,
) -> None:
    engine = bench.engine(PLAIN, timings=ProcessTimings(first_pause_s=0.01))
    keeping = asyncio.create_task(engine.keep_running())
    await until(lambda: engine.wanted and engine.running)
    first = engine.pid
    for process in bench.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # the first took it along
            process.kill()

    await until(lambda: engine.running and engine.pid != first)

    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await engine.stop()
    assert bench.processes() == []


async def test_the_pause_between_starts_that_fail_grows(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    timings = ProcessTimings(first_pause_s=0.01, longest_pause_s=0.04)
    engine = bench.command("no-such-program", timings=timings)
    keeping = asyncio.create_task(engine.keep_running())

    await until(lambda: len(caplog.messages) >= 4)

    keeping.cancel()
    pauses = [message.partition(" in ")[2].partition(" s:")[0] for message in caplog.messages[:4]]
    assert pauses == ["0.01", "0.02", "0.04", "0.04"]

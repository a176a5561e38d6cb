"""The command `twolane`: the parser. A command is imported when it is called.

`--help`, `status` and `pin` start in a fraction of a second, because nothing here imports the
server, its settings or an engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gateway import installation
from gateway.compare.arguments import add_commands as add_compare
from gateway.doctor.arguments import add_command as add_doctor
from gateway.errors import UsageError
from gateway.plan.arguments import add_command as add_plan
from gateway.simulate.arguments import add_command as add_simulate

EXAMPLES = """\
examples:
  twolane serve
      use the engines that run on this machine, or the embedded one
  twolane serve --pair chat=ollama:llama3.1:70b,vllm:llama-70b-awq
      one name for a model of each engine
  twolane serve --config twolane.yaml
      with settings from a file; twolane.example.yaml explains each
  twolane plan llama-3.3-70b --cards 2x24
      what fits on the cards, before anything is downloaded
  twolane doctor --config twolane.yaml
      what will fail, before it does
  twolane status --watch
      lanes, demand, queues and the last decisions of a running gateway
  twolane compare --config twolane.yaml
      which engine is faster here, and from how many concurrent requests on
  twolane calibrate --config twolane.yaml
      the same, measured for the gateway to decide by
  twolane init box
      a folder to start from: compose.yaml, Dockerfile, settings

`twolane COMMAND --help` explains a command. Each setting is also an
environment variable: TWOLANE_PORT=9000, TWOLANE_LIMITS__MAX_WAIT_S=30.
"""

SERVE = """\
examples:
  twolane serve
      use the engines that run on this machine, or the embedded one
  twolane serve --pair chat=ollama:llama3.1:70b,vllm:llama-70b-awq
      clients ask for `chat`; the gateway chooses the engine
  twolane serve --config twolane.yaml --port 9000
      settings from a file; the command line takes precedence
  TWOLANE_API_KEYS='["a-long-secret"]' twolane serve --host 0.0.0.0
      for other machines too; clients must then send the key

Each setting is also an environment variable, its parts joined by two
underscores: TWOLANE_PORT=9000, TWOLANE_LIMITS__MAX_WAIT_S=30.
"""

STATUS = """\
examples:
  twolane status --watch
      a fresh status each second
  twolane status --url http://box:8000 --key KEY
      of a gateway on another machine
  twolane status --json | jq .models
      for scripts
"""

PIN = """\
examples:
  twolane pin vllm     answer all requests on vLLM; the GPU goes to it
  twolane pin auto     let the policy decide again, also after `twolane release`
"""

RELEASE = """\
example:
  twolane release && python train.py; twolane pin auto
      clients receive 503 while the training job has the GPU
"""


INIT = """\
examples:
  twolane init box
      then follow what it prints: edit box/.env, start with `docker compose`
  twolane init box --wheel dist/twolane-0.1.0-py3-none-any.whl
      with this wheel in the image, in place of the one that is installed here
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 where a command cannot work with what it was given."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except UsageError as exc:
        _fail(str(exc))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    for line in message.splitlines():
        print(f"twolane: {line}", file=sys.stderr)  # noqa: T201 - a command's way to speak
    sys.exit(2)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps a paragraph at the terminal's width, and leaves the lines of examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)  # noqa: SLF001


class _Parser(argparse.ArgumentParser):
    """A parser whose help is formatted so, those of the tools' commands included."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "formatter_class": _HelpFormatter})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="twolane",
        description="One OpenAI endpoint over Ollama and vLLM: each request goes to the engine "
        "that is faster at this load, and every answer says why.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    _add_pin(commands)
    _add_release(commands)
    add_doctor(commands)
    add_plan(commands)
    add_compare(commands, _pair)
    add_simulate(commands)
    _add_init(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        print(f"twolane {installation.version()}")  # noqa: T201 - a command's way to speak
        parser.exit()


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start the gateway",
        description="Start the gateway. Without a file it looks for Ollama on port 11434, vLLM on "
        "8001 or 8000, and llama-server on 8080, and serves their models. It starts the embedded "
        "engine where it finds none.",
        epilog=SERVE,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000)")
    parser.add_argument(
        "--pair",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=ollama:MODEL,vllm:MODEL",
        help="serve the models of two engines under one name; may be repeated",
    )
    parser.add_argument(
        "--allow-public-without-key",
        action="store_true",
        default=None,
        help="let anybody who reaches this machine use the gateway, without a key",
    )
    parser.set_defaults(run=_serve)


def _add_status(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show lanes, demand, queues, health and the last decisions",
        description="Show the status of a running gateway.",
        epilog=STATUS,
    )
    _add_address(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, once")
    parser.add_argument("--watch", action="store_true", help="every second, until Ctrl-C")
    parser.set_defaults(run=_status)


def _add_pin(commands: Any) -> None:
    parser = commands.add_parser(
        "pin",
        help="keep the requests on one engine, or let the policy decide again",
        description="Answer the requests of a running gateway on one engine. In an exclusive "
        "placement the GPU is handed over to it. `auto` lets the policy decide again.",
        epilog=PIN,
    )
    parser.add_argument(
        "lane", metavar="ENGINE|auto", help="a lane, as `twolane status` names it; auto: none"
    )
    _add_address(parser)
    parser.set_defaults(run=_pin)


def _add_release(commands: Any) -> None:
    parser = commands.add_parser(
        "release",
        help="give the GPU's memory to another program, a training job perhaps",
        description="Drain, and have the engine that holds the GPU give its memory back. Requests "
        "receive 503 until `twolane pin auto`.",
        epilog=RELEASE,
    )
    _add_address(parser)
    parser.set_defaults(run=_release)


def _add_init(commands: Any) -> None:
    parser = commands.add_parser(
        "init",
        help="write a folder to start from: compose.yaml, Dockerfile, settings",
        description="Write a folder with all that `docker compose up` needs: compose.yaml, the "
        "files it mounts, .env, a Dockerfile and the wheel that it installs. An example of "
        "twolane.yaml is beside them.",
        epilog=INIT,
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path(),
        metavar="FOLDER",
        help="where to write (this folder)",
    )
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE",
        help="the wheel of twolane to install in the image (the one that is installed here)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="overwrite files that are there; keys are kept"
    )
    parser.set_defaults(run=_init)


def _add_address(parser: argparse.ArgumentParser) -> None:
    """Where a running gateway is, and the key to it."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (%(default)s)")
    parser.add_argument(
        "--key",
        help="API key; for pin and release an admin key, where there are any (default: the first "
        "of TWOLANE_API_KEYS; for pin and release of TWOLANE_ADMIN_KEYS, if set)",
    )


def _pair(text: str) -> tuple[str, dict[str, str]]:
    """The name and the model of each engine in `NAME=ollama:MODEL,vllm:MODEL`.

    Names of models may have colons themselves.
    """
    from backends.kinds import KINDS  # noqa: PLC0415 - imported when it is called

    name, _, rest = text.partition("=")
    lanes: dict[str, str] = {}
    for part in rest.split(","):
        kind, _, model = part.strip().partition(":")
        if kind not in KINDS or not model:
            message = (
                f"{part!r} is not ENGINE:MODEL with one of {', '.join(KINDS)}; "
                "write NAME=ollama:MODEL,vllm:MODEL"
            )
            raise argparse.ArgumentTypeError(message)
        lanes[kind] = model
    if not name:
        raise argparse.ArgumentTypeError("the name before = is missing")
    return name, lanes


# A command is imported when it is called.


def _serve(args: argparse.Namespace) -> None:
    from gateway.serve import serve  # noqa: PLC0415

    serve(args)


def _status(args: argparse.Namespace) -> None:
    from gateway.operate import status  # noqa: PLC0415

    status(args)


def _pin(args: argparse.Namespace) -> None:
    from gateway.operate import pin  # noqa: PLC0415

    pin(args)


def _release(args: argparse.Namespace) -> None:
    from gateway.operate import release  # noqa: PLC0415

    release(args)


def _init(args: argparse.Namespace) -> None:
    from gateway.init import init  # noqa: PLC0415

    init(args)

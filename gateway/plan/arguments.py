"""The command line of `twolane plan`.

Nothing heavy is imported here: the work is imported when the command is called.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gateway.errors import UsageError
from gateway.sizing.assumptions import DEFAULT_CONTEXT, KV_BITS, MAX_OLLAMA_SLOTS
from gateway.sizing.cards import DATA_SHEETS, Cards, parse_cards
from gateway.sizing.known import KNOWN_MODELS

PLAN_EXAMPLES = """\
examples:
  twolane plan llama-3.3-70b
      both engines' usual 4-bit versions of it, on the cards of this machine
  twolane plan llama-3.3-70b --cards 2x24 --ram 96
      the same for another machine, or one not yet bought; also 2x3090, 1x5090, 2x23.5
  twolane plan --ollama qwen2.5:72b-instruct-q4_K_S --vllm Qwen/Qwen2.5-72B-Instruct-AWQ
      each engine's own name of it; the quantization is read from the name
  twolane plan --ollama model.gguf --vllm ./model-awq
      files on this disk: the sizes are read from their headers
  twolane plan qwen2.5-32b --tokens 4000 --at 8,16,32
      what 8, 16 and 32 concurrent requests of 4,000 tokens mean, prompt and answer together
  twolane plan qwen2.5-32b --cards 2x24 --ram 96 --write
      write .env for compose.yaml, and twolane.yaml, into this folder
  twolane plan --ollama my-34b --vllm my-34b-awq --shape layers=60,hidden=7168,heads=56,\\
kv-heads=8,intermediate=20480,vocab=64000
      a model that is not known here, in the numbers of its config.json

known models: {names}

how to read it:
  Weights and KV cache are computed, to a percent. What engines take beside them is assumed, and
  listed at the end. Speeds are upper bounds: each decoding step reads all weights once and the KV
  cache of each stream, so bandwidth / bytes is the limit; expect half to four fifths of it.
  Exit code: 0 it fits, 1 it does not (and what would), 2 the arguments are wrong.
"""


def add_command(commands: Any) -> None:
    """Add `plan` to the commands of `twolane`.

    Args:
        commands: The result of `ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser(
        "plan",
        help="compute what fits on the cards, and what 16 or 32 concurrent requests will mean",
        description="Compute what a model needs on Ollama and vLLM on these cards: whether it "
        "fits, how many requests really run concurrently, how fast it can be at most, and the "
        "flags to start the engines with. Nothing is downloaded or started.",
        epilog=PLAN_EXAMPLES.format(names=", ".join(KNOWN_MODELS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_models(parser)
    _add_machine(parser)
    _add_load(parser)
    _add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=Path(), metavar="FOLDER",
        help="write .env and twolane.yaml into this folder (the current one)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.set_defaults(run=_plan)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a known model: both engines' usual 4-bit versions",
    )  # fmt: skip
    parser.add_argument(
        "--ollama", metavar="NAME|FILE", help="the model on Ollama: its name there, or a GGUF file"
    )
    parser.add_argument(
        "--vllm", metavar="NAME|FOLDER",
        help="the model on vLLM: its name, or a folder with config.json and safetensors",
    )  # fmt: skip
    parser.add_argument("--name", help="public name (of the model, if known)")
    parser.add_argument(
        "--shape", metavar="NAME=N,…", help="shape of a model that is not known; see the example"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cards", type=_cards, metavar="NxGIB",
        help="2x24: two cards of 24 GiB, of which 23.5 are usable; 2x23.5: two with 23.5 GiB "
        f"usable; 2x4090 or 2x23.6@4090: two of a known kind ({', '.join(DATA_SHEETS)}); default: "
        "the cards of this machine",
    )  # fmt: skip
    parser.add_argument("--ram", type=_positive, metavar="GIB", help="RAM of the machine, GiB")
    parser.add_argument(
        "--placement", choices=("exclusive", "shared"),
        help="one engine holds the cards at a time, or both share them (shared where both fit)",
    )  # fmt: skip


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context", type=_count, metavar="TOKENS",
        help="tokens of a slot, prompt and answer "
        f"({DEFAULT_CONTEXT}, fewer where that does not fit)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=_count, default=1500, metavar="N",
        help="tokens of a typical request, prompt and answer (1500)",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=_counts, default=(16, 32), metavar="N,N",
        help="numbers of concurrent requests (16,32)",
    )  # fmt: skip


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ollama-slots", type=_count, metavar="N",
        help=f"concurrent requests on Ollama (as many as fit, {MAX_OLLAMA_SLOTS} at most)",
    )  # fmt: skip
    parser.add_argument(
        "--ollama-kv", choices=tuple(KV_BITS["ollama"]), default="q8_0",
        help="type of Ollama's KV cache (q8_0)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-slots", type=_count, default=32, metavar="N",
        help="requests that vLLM batches at most (32)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-kv", choices=tuple(KV_BITS["vllm"]),
        help="type of vLLM's KV cache (fp8 where the cards compute in it)",
    )  # fmt: skip
    parser.add_argument("--tp", type=_count, metavar="N", help="tensor parallel ranks (all cards)")
    parser.add_argument("--pp", type=_count, metavar="N", help="pipeline parallel stages (1)")
    parser.add_argument(
        "--utilization", type=_share, default=0.95, metavar="SHARE",
        help="share of each card for vLLM where it is alone (0.95)",
    )  # fmt: skip


def _cards(text: str) -> Cards:
    try:
        return parse_cards(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return number


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 0 < number < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of a card, as 0.95")
    return number


def _plan(args: argparse.Namespace) -> None:
    from gateway.plan.command import run_plan  # noqa: PLC0415 - only when it is called

    run_plan(args)

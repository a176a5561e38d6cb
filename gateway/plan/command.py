"""`twolane plan`: what two engines need on these cards, before anything is downloaded.

The sizes come from `gateway.sizing`. Here the arguments become models and cards, and the plan is
printed, or written to the files that `compose.yaml` and `twolane serve` read.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from gateway.errors import UsageError
from gateway.gpu.cards import Nvml
from gateway.plan.machine import detect_cards, machine_ram_gib
from gateway.plan.tables import render
from gateway.plan.text import assumptions
from gateway.plan.written import files, write_files
from gateway.sizing.cards import Cards
from gateway.sizing.figures import Plan, Requirements
from gateway.sizing.files import read_weights
from gateway.sizing.fit import make_plan
from gateway.sizing.known import KNOWN_MODELS, find_known, weights_by_name
from gateway.sizing.shapes import SHAPE_HINT, PlannedEngine, Shape, Weights, parse_shape


def run_plan(args: argparse.Namespace) -> None:
    """Run `twolane plan`; exits with 1 where it does not fit."""
    ollama, vllm = _models(args)
    cards = args.cards or detect_cards(Nvml())
    ram_gib = args.ram or (machine_ram_gib() if args.cards is None else None)
    plan = make_plan(ollama, vllm, cards, _requirements(args, ram_gib))
    name = _public_name(args)
    command = _repeatable_command(args, cards, ram_gib)
    console = Console()
    if args.json:
        answer = {"name": name, "command": command, **_as_json(plan)}
        sys.stdout.write(json.dumps(answer, indent=1) + "\n")
        console = Console(stderr=True)
    else:
        for part in render(name, plan):
            # Commands are to be copied: no line breaks of ours in them.
            console.print(part, soft_wrap=isinstance(part, str), highlight=False)
    if plan.faults:
        if args.write is not None:
            print("twolane: it does not fit, so nothing was written", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    if args.write is not None:
        for path in write_files(args.write, files(name, command, plan), force=args.force):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _requirements(args: argparse.Namespace, ram_gib: float | None) -> Requirements:
    return Requirements(
        context=args.context, tokens=args.tokens, concurrency=args.at,
        ollama_slots=args.ollama_slots, ollama_kv=args.ollama_kv, vllm_slots=args.vllm_slots,
        vllm_kv=args.vllm_kv, tensor=args.tp, pipeline=args.pp, utilization=args.utilization,
        placement=args.placement, ram_gib=ram_gib,
    )  # fmt: skip


def _models(args: argparse.Namespace) -> tuple[Weights | None, Weights | None]:
    """The weights on Ollama and on vLLM; None for an engine that no argument names."""
    shape = parse_shape(args.shape) if args.shape else None
    if args.model is not None and args.model not in KNOWN_MODELS:
        raise _unknown_model_error(args.model, shape)
    ollama, vllm = args.ollama or args.model, args.vllm or args.model
    return (
        _weights(ollama, "ollama", shape) if ollama else None,
        _weights(vllm, "vllm", shape) if vllm else None,
    )


def _unknown_model_error(text: str, shape: Shape | None) -> UsageError:
    if Path(text).exists():
        return UsageError(
            f"{text}: this is a file; name the engine that would serve it: --ollama FILE.gguf, or "
            "--vllm FOLDER"
        )
    if shape is not None:
        return UsageError(f"{text}: with --shape, name the model by --ollama and --vllm")
    key = find_known(text)
    if key is None:
        weights_by_name(text, "ollama")  # raises, with similar names
    return UsageError(
        f"{text}: do you mean {key}? To plan for this very name use --ollama and --vllm"
    )


def _weights(text: str, engine: PlannedEngine, shape: Shape | None) -> Weights:
    path = Path(text).expanduser()
    is_path = path.suffix in (".gguf", ".json", ".safetensors") or text.startswith(("/", ".", "~"))
    if not path.exists() and not is_path:
        return weights_by_name(text, engine, shape)
    if not path.exists():
        raise UsageError(f"--{engine} {text}: there is no such file. {SHAPE_HINT}")
    weights = read_weights(path)
    is_gguf = not path.is_dir() and path.suffix not in (".json", ".safetensors")
    if is_gguf != (engine == "ollama"):
        expected = "a GGUF file" if engine == "ollama" else "a folder of safetensors"
        raise UsageError(f"--{engine} {text}: {engine} loads {expected}, and this is not one")
    return weights


def _public_name(args: argparse.Namespace) -> str:
    if args.name:
        return str(args.name)
    text = args.model or args.ollama or args.vllm
    return find_known(text) or re.sub(r"[^a-z0-9.]+", "-", Path(text).stem.lower()).strip("-")


def _repeatable_command(args: argparse.Namespace, cards: Cards, ram_gib: float | None) -> str:
    """The command that computes the same plan on any machine."""
    words = ["twolane", "plan", *([args.model] if args.model else [])]
    options = {
        "ollama": args.ollama, "vllm": args.vllm, "name": args.name, "shape": args.shape,
        "cards": cards.spec, "ram": None if ram_gib is None else f"{ram_gib:g}",
        "placement": args.placement, "context": args.context,
        "tokens": args.tokens if args.tokens != 1500 else None,
        "at": ",".join(map(str, args.at)) if args.at != (16, 32) else None,
        "ollama-slots": args.ollama_slots,
        "ollama-kv": args.ollama_kv if args.ollama_kv != "q8_0" else None,
        "vllm-slots": args.vllm_slots if args.vllm_slots != 32 else None,
        "vllm-kv": args.vllm_kv, "tp": args.tp, "pp": args.pp,
        "utilization": args.utilization if args.utilization != 0.95 else None,
    }  # fmt: skip
    for option, value in options.items():
        if value is not None:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _as_json(plan: Plan) -> dict[str, Any]:
    """The plan for a program to read, with what was assumed."""
    fields: dict[str, Any] = msgspec.to_builtins(plan)
    return {**fields, "fits": not plan.faults, "assumed": list(assumptions(plan))}

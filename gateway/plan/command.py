"""`twolane plan`: what two engines would be on these cards, before anything is downloaded.

What a model weighs is told by `weights`, what fits by `fit`. Here the cards are looked at, the
answer is shown, and written down as the files that `compose.yaml` and `twolane serve` read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from backends.kinds import KINDS
from gateway.gpu.memory import MemoryUnknown, Nvml
from gateway.settings import SettingsError
from gateway.sizing import fit, weights
from gateway.sizing.fit import Cards, Lane, Plan, Wish
from gateway.sizing.weights import GIB, KNOWN, Engine, Weights

#: GiB on the box, GB/s, dense TFLOPS of 16 bit with 32-bit sums, fp8, and whether cards reach each
#: other without the host (NVIDIA's data sheets; GeForce has no P2P from the 4090 on).
SHEETS: Mapping[str, tuple[float, float, float, bool, bool]] = {
    "3090": (24, 936, 71.2, False, False),
    "4090": (24, 1008, 165.2, True, False),
    "5090": (32, 1792, 209.5, True, False),
    "A6000": (48, 768, 154.8, False, True),
    "L40S": (48, 864, 362.0, True, True),
    "H100": (80, 3350, 989.4, True, True),
    "H200": (140, 4800, 989.4, True, True),
}
#: Of what is on the box the driver keeps a little: 23.5 of 24 GiB can be used.
USABLE = 23.5 / 24
#: What a card of this size is taken to be where nobody says it.
USUAL = {24: "4090"}

EXAMPLES = """\
examples:
  twolane plan llama-3.3-70b
      both engines' usual 4-bit versions of it, on the cards of this machine
  twolane plan llama-3.3-70b --cards 2x24 --ram 96
      the same for a box that is not here, or not yet bought; also 2x3090, 1x5090, 2x23.5
  twolane plan --ollama qwen2.5:72b-instruct-q4_K_S --vllm Qwen/Qwen2.5-72B-Instruct-AWQ
      each engine's own name of it; the quantization is read from the name
  twolane plan --ollama model.gguf --vllm ./model-awq
      files that are here already: their headers tell the sizes
  twolane plan qwen2.5-32b --tokens 4000 --at 8,16,32
      what it means that 8, 16, 32 people ask for 4,000 tokens each, prompt and answer
  twolane plan qwen2.5-32b --cards 2x24 --ram 96 --write
      write .env for compose.yaml, and twolane.yaml, here
  twolane plan --ollama my-34b --vllm my-34b-awq --shape layers=60,hidden=7168,heads=56,\\
kv-heads=8,intermediate=20480,vocab=64000
      a model that is not known here, in the numbers of its config.json

names known: {names}

how to read it:
  Weights and KV are arithmetic, to a percent. What engines hold beside them is assumed, and said
  so at the end. Speeds are bounds: a step of decoding reads all weights once and each stream's
  KV, so bandwidth / bytes is the most there can be; expect half to four fifths of it.
  Exit code: 0 it fits, 1 it does not (and what would), 2 not understood.
"""


def add_command(commands: Any) -> None:
    """Add `plan` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "plan",
        help="say what fits on the cards, and what 16 or 32 at once will mean, before the start",
        description="Say what a model would be on Ollama and vLLM on these cards: whether it "
        "fits, how many requests really run at once, how fast it can be at most, and with which "
        "flags. Nothing is downloaded or started.",
        epilog=EXAMPLES.format(names=", ".join(KNOWN)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a known name: both engines' usual 4-bit versions"
    )
    parser.add_argument(
        "--ollama", metavar="NAME|FILE", help="what Ollama would serve: its name, or a GGUF file"
    )
    parser.add_argument(
        "--vllm", metavar="NAME|FOLDER",
        help="what vLLM would serve: its name, or a folder with config.json and safetensors",
    )  # fmt: skip
    parser.add_argument("--name", help="public name (of the model, if known)")
    parser.add_argument(
        "--shape", metavar="NAME=N,…", help="of a model that is not known, see the last example"
    )
    parser.add_argument(
        "--cards", type=_cards, metavar="NxGIB",
        help="2x24: two of 24 GiB on the box, of which 23.5 can be used; 2x23.5: of so much that "
        f"can be used; 2x4090 or 2x23.6@4090: of a known kind ({', '.join(SHEETS)}); this "
        "machine's if not given",
    )  # fmt: skip
    parser.add_argument("--ram", type=_positive, metavar="GIB", help="the machine's RAM")
    parser.add_argument(
        "--placement", choices=("exclusive", "shared"),
        help="one engine at a time, or both (shared where both fit)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=_count, metavar="TOKENS",
        help=f"of a slot, prompt and answer ({fit.CONTEXT}, less where that does not fit)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=_count, default=1500, metavar="N",
        help="of a request, prompt and answer, to think with (1500)",
    )  # fmt: skip
    parser.add_argument(
        "--at", type=_counts, default=(16, 32), metavar="N,N", help="requests at once (16,32)"
    )
    parser.add_argument(
        "--ollama-slots", type=_count, metavar="N",
        help=f"requests Ollama answers at once (as fit, {fit.FEW} at most)",
    )  # fmt: skip
    parser.add_argument("--ollama-kv", choices=tuple(fit.KV_BITS["ollama"]), default="q8_0")
    parser.add_argument(
        "--vllm-slots", type=_count, default=32, metavar="N",
        help="requests vLLM batches at most (32)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-kv", choices=tuple(fit.KV_BITS["vllm"]), help="(fp8 where the cards compute in it)"
    )
    parser.add_argument("--tp", type=_count, metavar="N", help="tensor parallel (all cards)")
    parser.add_argument("--pp", type=_count, metavar="N", help="pipeline parallel (1)")
    parser.add_argument(
        "--utilization", type=_share, default=0.95, metavar="SHARE",
        help="of each card for vLLM where it is alone (0.95)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=Path(), metavar="FOLDER",
        help="write .env and twolane.yaml there (here)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.set_defaults(run=_plan)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return number


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 0 < number < 10**8:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of a card, as 0.95")
    return number


# The cards


def _cards(text: str) -> Cards:
    """`2x24`, `2x23.5`, `2x4090`, `2x23.6@4090`."""
    match = re.fullmatch(r"(\d{1,3})x([\w.]+)(?:@(\w+))?", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no cards: write NUMBERxGIB, as 2x24, or NUMBERxCARD, as 2x4090"
        )
    count, size, name = int(match[1]), match[2], match[3]
    if name is None and size in SHEETS:
        return _of_sheet(count, SHEETS[size][0] * USABLE, size, text)
    try:
        gib = float(size)
    except ValueError:
        gib = 0.0
    if not 1 <= gib < 1000:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a card of {size} GiB is not known here; cards known by name: "
            f"{', '.join(SHEETS)}"
        )
    if name is not None and name not in SHEETS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {name} is not known here; known: {', '.join(SHEETS)}"
        )
    guess = USUAL.get(round(gib)) if name is None and gib == int(gib) else None
    usable = gib * USABLE if name is None and "." not in size else gib
    return _of_sheet(count, usable, name or guess, text, assumed=guess is not None)


def _of_sheet(
    count: int, gib: float, name: str | None, told: str, *, assumed: bool = False
) -> Cards:
    if name is None:
        return Cards(count, gib, told)
    _, gbs, tflops, fp8, p2p = SHEETS[name]
    return Cards(count, gib, told, name, gbs, tflops, fp8, p2p, assumed)


def found(nvml: Nvml) -> Cards:
    """The cards of this machine.

    Raises:
        SettingsError: None is seen.
    """
    try:
        cards = nvml.cards()
    except MemoryUnknown as exc:
        raise SettingsError(
            f"no card is seen here ({exc}). Say which there will be: --cards 2x24"
        ) from exc
    name, _ = cards[0]
    known = next((one for one in SHEETS if one.lower() in name.lower().replace(" ", "")), None)
    gib = math.floor(min(size for _, size in cards) / GIB * 100) / 100
    told = f"{len(cards)}x{gib:.2f}" + (f"@{known}" if known else "")
    return _of_sheet(len(cards), gib, known, told)


# What it does


def _plan(args: argparse.Namespace) -> None:
    ollama, vllm = _models(args)
    cards = args.cards or found(Nvml())
    ram = args.ram or (_ram_here() if args.cards is None else None)
    thought = fit.plan(ollama, vllm, cards, _wish(args, ram))
    name = _public(args)
    made_by = _command(args, cards, ram)
    console = Console()
    if args.json:
        said = {"name": name, "command": made_by, **_told(thought)}
        sys.stdout.write(json.dumps(said, indent=1) + "\n")
        console = Console(stderr=True)
    else:
        for part in _shown(name, thought):
            # Commands are to be copied: no line breaks of ours in them.
            console.print(part, soft_wrap=isinstance(part, str), highlight=False)
    if thought.faults:
        if args.write is not None:
            print("twolane: it does not fit, nothing is written", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    if args.write is not None:
        for path in _write(args.write, _files(name, made_by, thought), force=args.force):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _ram_here() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def _wish(args: argparse.Namespace, ram: float | None) -> Wish:
    return Wish(
        context=args.context, tokens=args.tokens, at=args.at, ollama_slots=args.ollama_slots,
        ollama_kv=args.ollama_kv, vllm_slots=args.vllm_slots, vllm_kv=args.vllm_kv,
        tensor=args.tp, pipeline=args.pp, utilization=args.utilization, placement=args.placement,
        ram=ram,
    )  # fmt: skip


def _models(args: argparse.Namespace) -> tuple[Weights | None, Weights | None]:
    shape = weights.by_hand(args.shape) if args.shape else None
    if args.model is not None and args.model not in KNOWN:
        if Path(args.model).exists():
            raise SettingsError(
                f"{args.model}: say which engine would serve this file: --ollama FILE.gguf, or "
                "--vllm FOLDER"
            )
        if shape is None:
            key = weights.known(args.model)
            if key is None:
                weights.named(args.model, "ollama")  # says what is near
            raise SettingsError(f"{args.model}: do you mean {key}? Else --ollama and --vllm")
        raise SettingsError(f"{args.model}: with --shape name it by --ollama and --vllm")
    ollama, vllm = args.ollama or args.model, args.vllm or args.model
    return (
        _one(ollama, "ollama", shape) if ollama else None,
        _one(vllm, "vllm", shape) if vllm else None,
    )


def _one(text: str, engine: Engine, shape: weights.Shape | None) -> Weights:
    path = Path(text).expanduser()
    file = path.suffix in (".gguf", ".json", ".safetensors") or text.startswith(("/", ".", "~"))
    if not path.exists() and not file:
        return weights.named(text, engine, shape)
    if not path.exists():
        raise SettingsError(f"--{engine} {text}: there is no such file. {weights.BY_HAND}")
    made = weights.read(path)
    of_ollama = not path.is_dir() and path.suffix not in (".json", ".safetensors")
    if of_ollama != (engine == "ollama"):
        takes = "a GGUF file" if engine == "ollama" else "a folder of safetensors"
        raise SettingsError(f"--{engine} {text}: it takes {takes}")
    return made


def _public(args: argparse.Namespace) -> str:
    if args.name:
        return str(args.name)
    text = args.model or args.ollama or args.vllm
    return weights.known(text) or re.sub(r"[^a-z0-9.]+", "-", Path(text).stem.lower()).strip("-")


def _command(args: argparse.Namespace, cards: Cards, ram: float | None) -> str:
    """The command that thinks the same again, on any machine."""
    words = ["twolane", "plan", *([args.model] if args.model else [])]
    said = {
        "ollama": args.ollama, "vllm": args.vllm, "name": args.name, "shape": args.shape,
        "cards": cards.told, "ram": None if ram is None else f"{ram:g}",
        "placement": args.placement, "context": args.context,
        "tokens": args.tokens if args.tokens != 1500 else None,
        "at": ",".join(map(str, args.at)) if args.at != (16, 32) else None,
        "ollama-slots": args.ollama_slots,
        "ollama-kv": args.ollama_kv if args.ollama_kv != "q8_0" else None,
        "vllm-slots": args.vllm_slots if args.vllm_slots != 32 else None,
        "vllm-kv": args.vllm_kv, "tp": args.tp, "pp": args.pp,
        "utilization": args.utilization if args.utilization != 0.95 else None,
    }  # fmt: skip
    for name, value in said.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# What it shows


def _told(thought: Plan) -> dict[str, Any]:
    """The plan for a program to read, with what was assumed."""
    told: dict[str, Any] = msgspec.to_builtins(thought)
    return {**told, "fits": not thought.faults, "assumed": list(_assumed(thought))}


def _shown(name: str, thought: Plan) -> Iterator[Any]:
    verdict = "[red]does not fit[/] as" if thought.faults else "[green]fits[/],"
    yield (
        f"[bold]{name}[/] on {_cards_told(thought.cards)}: {verdict} "
        f"[bold]{thought.placement}[/]: {thought.placement_why}"
    )
    yield ""
    yield _memory(thought)
    yield _at_once(thought)
    if thought.cards.gbs is None:
        yield (
            "[dim]no bounds on speed, of these cards only the size is known; say which they are: "
            f"--cards {thought.cards.count}x{thought.cards.gib:.4g}@4090[/]\n"
        )
    else:
        yield _speeds(thought)
    if thought.pinned_ram_gib:
        low, high = thought.pinned_ram_gib
        of = "" if thought.wish.ram is None else f" of {thought.wish.ram:g}"
        yield f"RAM: a sleeping vLLM pins {low:.0f} to {high:.0f} GiB{of}, and keeps them\n"
    for lane in thought.lanes.values():
        yield f"[bold]{lane.engine}[/]"
        yield f"  {_started(lane)}\n"
    for note in thought.notes:
        yield f"[yellow]note[/] {note}"
    for fault in thought.faults:
        yield f"[red]does not fit[/] {fault}"
    yield "[dim]" + "\n".join(_assumed(thought)) + "[/]"


def _cards_told(cards: Cards) -> str:
    known = f"RTX {cards.name}" if str(cards.name).isdecimal() else cards.name
    name = f" ({known}{', assumed' if cards.assumed else ''})" if known else ""
    return f"{cards.count} x {cards.gib:.4g} GiB{name}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _memory(thought: Plan) -> Table:
    lanes = list(thought.lanes.values())
    table = _table("memory", "", *(lane.engine for lane in lanes))
    table.add_row("model", *(lane.weights.name for lane in lanes))
    table.add_row("quantization", *(lane.weights.scheme for lane in lanes))
    table.add_row("weights, GiB", *(f"{lane.weights_gib:.1f}" for lane in lanes))
    table.add_row("  on each card", *(_on_each(lane) for lane in lanes))
    table.add_row(
        "KV a token, KiB", *(_by_type({k: f"{v:g}" for k, v in _rounded(lane)}) for lane in lanes)
    )
    table.add_row("KV tokens that fit, alone", *(_tokens(lane.tokens_alone) for lane in lanes))
    if any(lane.tokens_beside for lane in lanes):
        table.add_row(
            "  beside a sleeping vLLM", *(_tokens(lane.tokens_beside) or "-" for lane in lanes)
        )
    table.add_row("planned: KV type", *(lane.kv for lane in lanes))
    table.add_row("  KV tokens in all", *(f"{lane.tokens:,}" for lane in lanes))
    table.add_row(
        "  slots x context",
        *(f"{'up to ' if lane.engine == 'vllm' else ''}{lane.slots} x {lane.context:,}"
          for lane in lanes),
    )  # fmt: skip
    table.add_row(
        "  GPU memory that must be free, GiB", *(f"{_up(lane.memory_gib):.1f}" for lane in lanes)
    )
    if any(lane.on_cpu_gib for lane in lanes):
        table.add_row("  would run on the CPU, GiB", *(f"{lane.on_cpu_gib:.1f}" for lane in lanes))
    return table


def _on_each(lane: Lane) -> str:
    if lane.engine == "ollama":
        return f"{lane.weights_card_gib:.1f} (layers)"
    return f"{lane.weights_card_gib:.1f} (TP {lane.tensor}, PP {lane.pipeline})"


def _rounded(lane: Lane) -> list[tuple[str, float]]:
    return [(kind, round(size, 1)) for kind, size in lane.kv_kib.items()]


def _by_type(said: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} {text}" for kind, text in said.items())


def _tokens(said: Mapping[str, int]) -> str:
    return _by_type({kind: f"{tokens / 1000:,.1f}k" for kind, tokens in said.items()})


def _at_once(thought: Plan) -> Table:
    table = _table(
        f"what it means that so many ask at once, for {thought.wish.tokens:,} tokens each",
        "at once", "engine", "tokens needed", "resident", "run at once", "wait", "tok/s at most",
    )  # fmt: skip
    for number, asked in enumerate(thought.wish.at):
        for lane in thought.lanes.values():
            one = lane.at[number]
            bound = "?" if one.bound_tokens_s is None else _rate(one.bound_tokens_s)
            table.add_row(
                str(asked), lane.engine, f"{one.needed_tokens:,}", f"{one.resident_tokens:,}",
                str(one.running), str(one.queued) if one.queued else "-", bound,
            )  # fmt: skip
    return table


def _speeds(thought: Plan) -> Table:
    table = _table("bounds by the data sheets, not a promise", "", "tok/s", "because")
    cards = thought.cards
    for lane in thought.lanes.values():
        speed = lane.speed
        if speed is None:
            continue
        read = lane.weights.read / 1e9
        ranks = lane.tensor
        gbs = ranks * (cards.gbs or 0)
        turns = " (cards take turns)" if cards.count > ranks else ""
        table.add_row(
            f"{lane.engine}, one stream", _rate(speed.one_stream),
            f"{gbs:,.0f} GB/s / {read:.1f} GB read a token{turns}",
        )  # fmt: skip
        if speed.one_stream_all_reduce < 0.97 * speed.one_stream and ranks > 1:
            table.add_row(
                "  with all-reduces", _rate(speed.one_stream_all_reduce),
                f"2 x {lane.weights.shape.layers} layers x {fit.ALL_REDUCE_S * 1e6:.0f} us, "
                "without P2P (assumed)",
            )  # fmt: skip
        table.add_row(
            f"{lane.engine}, prefill", f"{speed.prefill:,.0f}",
            f"{_working(lane, cards) * (cards.tflops or 0):,.0f} TFLOPS / "
            f"{2 * lane.weights.active / 1e9:.0f} GFLOP a token",
        )  # fmt: skip
    return table


def _rate(tokens_s: float) -> str:
    return f"{tokens_s:,.0f}" if tokens_s >= 100 else f"{tokens_s:.1f}"


def _working(lane: Lane, cards: Cards) -> int:
    """Cards that can be busy at once with a long prompt."""
    return lane.tensor * lane.pipeline if lane.engine == "vllm" else cards.count


def _started(lane: Lane, port: int | None = None) -> str:
    """The command that starts this engine by hand."""
    before = " ".join(f"{name}={value}" for name, value in lane.environment.items())
    if lane.engine == "ollama":
        return f"{before} ollama serve"
    after = ["--host", "127.0.0.1", "--port", str(port)] if port else []
    words = shlex.join(["vllm", "serve", lane.weights.name, *after, *lane.arguments])
    return f"{before} {words}".strip()


def _assumed(thought: Plan) -> Iterator[str]:
    for lane in thought.lanes.values():
        yield f"{lane.engine}: weights {lane.weights.source}"
    beside = {"ollama": fit.OLLAMA_BESIDE, "vllm": fit.VLLM_BESIDE}
    held = ", ".join(f"{beside[name]:g} by {name}" for name in thought.lanes)
    yield f"assumed: GiB a card held beside weights and KV: {held}" + (
        f", {fit.ASLEEP:g} by a vLLM that sleeps" if thought.pinned_ram_gib else ""
    )
    if thought.cards.gbs is not None:
        yield (
            "bounds: a step takes max((weights + streams x KV) / bandwidth, streams x 2 x "
            "parameters / TFLOPS)"
            + (
                f"; vLLM's two all-reduces a layer {fit.ALL_REDUCE_S * 1e6:.0f} us each and "
                f"{fit.ALL_REDUCE_BYTES_S / 1e9:.0f} GB/s (assumed)"
                if not thought.cards.p2p and any(x.tensor > 1 for x in thought.lanes.values())
                else ""
            )
        )


# What it writes


def _up(gib: float) -> float:
    return math.ceil(round(gib * 10, 6)) / 10


def _files(name: str, made_by: str, thought: Plan) -> dict[str, str]:
    files = {"twolane.yaml": yaml(name, made_by, thought)}
    if len(thought.lanes) == 2:  # compose.yaml serves both
        files = {".env": env(name, made_by, thought), **files}
    return files


def _write(folder: Path, files: Mapping[str, str], *, force: bool) -> list[Path]:
    """All of the files or none.

    Raises:
        SettingsError: One is there already, or the folder cannot be written to.
    """
    there = [str(folder / name) for name in files if (folder / name).exists()]
    if there and not force:
        raise SettingsError(
            f"{' and '.join(there)} are there already, nothing is written; --force writes over"
            if len(there) > 1
            else f"{there[0]} is there already, nothing is written; --force writes over it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as exc:
        raise SettingsError(f"--write {folder}: {exc.strerror}") from exc
    return [folder / name for name in files]


def _value(text: str) -> str:
    """A value as `.env` files have it."""
    return text if re.fullmatch(r"[\w.:/@+-]*", text) else json.dumps(text)


def _extra(lane: Lane) -> str:
    """What compose.yaml does not say of itself."""
    return "" if lane.weights.dtype == "float16" else f"--dtype {lane.weights.dtype}"


def _sentences(lane: Lane) -> Iterator[str]:
    """What a lane's figures mean, one a line."""
    yield (
        f"{lane.weights.scheme}: {lane.weights_gib:.1f} GiB of weights, "
        f"{round(lane.kv_kib[lane.kv], 1):g} KiB of KV a token ({lane.kv})."
    )
    for one in lane.at:
        waiting = f", {one.queued} wait" if one.queued else ""
        yield (
            f"{one.requests} at once need {one.needed_tokens:,} tokens of KV, "
            f"{one.resident_tokens:,} are there: {one.running} run{waiting}."
        )
    if lane.speed:
        yield (
            f"At most {_rate(lane.speed.one_stream)} tok/s for one stream, by bandwidth; "
            f"prompts {lane.speed.prefill:,.0f} tok/s."
        )


def env(name: str, made_by: str, thought: Plan) -> str:
    """The `.env` that compose.yaml reads, with the plan's figures in its comments."""
    ollama, vllm = thought.lanes["ollama"], thought.lanes["vllm"]
    room = (
        f"beside a sleeping vLLM {_tokens(ollama.tokens_beside)} tokens fit."
        if ollama.tokens_beside
        else "for more lower vLLM's share below."
    )
    lines = [
        f"# {name} on {_cards_told(thought.cards)}, as compose.yaml reads it.",
        "# Written by:",
        f"#   {made_by} --write",
        "# Change what you like. The figures in the comments are arithmetic for the values as they",
        "# were written; ask `twolane plan` again what others would mean. Nothing was measured.",
        "",
        "# The name people choose in the chat page.",
        f"MODEL={_value(name)}",
        f"# {thought.placement}: {thought.placement_why}.",
    ]
    if thought.pinned_ram_gib:
        low, high = thought.pinned_ram_gib
        of = "" if thought.wish.ram is None else f" of {thought.wish.ram:g}"
        lines.append(
            f"# The vLLM that sleeps meanwhile pins {low:.0f} to {high:.0f} GiB{of} of RAM."
        )
    lines += [
        f"PLACEMENT={thought.placement}",
        "",
        "# Ollama: for one or a few.",
        *(f"# {said}" for said in _sentences(ollama)),
        f"OLLAMA_MODEL={_value(ollama.weights.name)}",
        "# Requests answered at once, and the tokens of each, prompt and answer. It takes slots x",
        f"# context whole when it loads; {room}",
        f"OLLAMA_SLOTS={ollama.slots}",
        f"OLLAMA_CONTEXT={ollama.context}",
        "# f16, q8_0 or q4_0.",
        f"OLLAMA_KV_CACHE_TYPE={ollama.kv}",
        "# GiB on all cards that must be free before it loads: weights, KV and",
        f"# {fit.OLLAMA_BESIDE:g} a card besides (assumed).",
        f"OLLAMA_MEMORY_GIB={_up(ollama.memory_gib):.1f}",
        "",
        f"# vLLM: for many. Of {thought.wish.tokens:,} tokens a request:",
        *(f"# {said}" for said in _sentences(vllm)),
        f"VLLM_MODEL={_value(vllm.weights.name)}",
        "# Requests batched at most, and the most tokens of one. KV is shared as it is used, so",
        f"# not all slots need to fit: {_tokens({vllm.kv: vllm.tokens})} tokens do.",
        f"VLLM_SLOTS={vllm.slots}",
        f"VLLM_CONTEXT={vllm.context}",
        "# fp8, or auto: 16 bit, and half the tokens.",
        f"VLLM_KV_CACHE_DTYPE={vllm.kv}",
        "# Cards that share each layer, times cards that take turns. Without NVLink vLLM's own",
        "# advice for many at once is 1 and 2; for one stream 2 and 1 is faster.",
        f"VLLM_TENSOR_PARALLEL={vllm.tensor}",
        f"VLLM_PIPELINE_PARALLEL={vllm.pipeline}",
        "# Its share of each card, all that it ever takes"
        + (": the rest is Ollama's." if thought.placement == "shared" else "."),
        f"VLLM_GPU_MEMORY_UTILIZATION={vllm.utilization:.2f}",
        "# GiB on all cards that must be free before it wakes: its share, less the "
        f"{fit.ASLEEP:g} a card that it keeps."
        if thought.pinned_ram_gib
        else "# GiB on all cards that this is.",
        f"VLLM_MEMORY_GIB={_up(vllm.memory_gib):.1f}",
        "# More flags. For tools, which it refuses otherwise: --enable-auto-tool-choice",
        "# --tool-call-parser hermes (Qwen), llama3_json (Llama) or mistral, in double quotes.",
        f"VLLM_EXTRA_ARGS={_value(_extra(vllm))}",
        "",
        "# Where it is reached. Beyond this machine (0.0.0.0) the gateway wants a key in",
        "# secrets/api_keys.",
        "GATEWAY_BIND=127.0.0.1",
        "GATEWAY_PORT=8000",
        "WEBUI_PORT=3000",
        "# Only with --profile metrics.",
        "PROMETHEUS_PORT=9090",
        "GRAFANA_PORT=3001",
        "",
        "# What answers cost, in `twolane status` and the metrics; empty: not reckoned. A kWh, and",
        "# what one could pay in place of it: an hour of such a machine, a million output tokens.",
        "CURRENCY=EUR",
        "ELECTRICITY_PER_KWH=",
        "RENT_PER_HOUR=",
        "API_PER_MILLION=",
        "# Watts of the whole machine, if somebody measured them; empty: what the cards say.",
        "MACHINE_WATTS=",
    ]
    return "\n".join(lines) + "\n"


def yaml(name: str, made_by: str, thought: Plan) -> str:
    """A twolane.yaml for engines that are started by hand on this machine."""
    order = list(thought.lanes)[::-1]  # vLLM first: it starts only on free cards
    shared = thought.placement == "shared" or len(order) < 2
    lines = [
        f"# {name} on {_cards_told(thought.cards)}: twolane serve --config twolane.yaml",
        "# (twolane.example.yaml explains every setting). Written by:",
        f"#   {made_by} --write",
        "#",
        "# Start the engines first" + (", vLLM before Ollama:" if len(order) > 1 else ":"),
        *(f"#   {_started(thought.lanes[kind], port=_port(kind))}" for kind in order),
        "",
        "engines:",
        *(f"  {kind}: {{urls: [{json.dumps(KINDS[kind].usual_url)}]}}" for kind in order),
        "models:",
        f"  {json.dumps(name)}:",
        f"    placement: {'shared' if shared else 'exclusive'}    # {thought.placement_why}",
        "    lanes:",
    ]
    for kind in order:
        lane = thought.lanes[kind]
        lines += [
            f"      {kind}:",
            f"        model: {json.dumps(lane.weights.name)}",
            f"        slots: {lane.slots}",
            f"        context: {lane.context}",
        ]
        if not shared:
            lines.append(f"        memory_gib: {_up(lane.memory_gib):.1f}")
    return "\n".join(lines) + "\n"


def _port(kind: Engine) -> int:
    return KINDS[kind].ports[0]

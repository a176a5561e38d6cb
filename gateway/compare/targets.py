"""What is measured: any address, or the lanes of a model in the settings."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from backends.transport import http
from gateway import settings
from gateway.errors import UsageError
from gateway.serving import discovery
from gateway.settings import Settings
from loadtests.measure import matrix
from loadtests.measure.experiment import Subject
from loadtests.measure.matrix import Entrant
from loadtests.measure.options import shareable_command
from loadtests.measure.stopwatch import Target


async def other_targets(targets: Sequence[Target], client: http.Client) -> list[Entrant]:
    """Targets of which only the address is known."""
    found = []
    for target in targets:
        kind = await discovery.kind_of(client, target.url)
        subject = Subject(target.label, target.url, target.model, engine=kind or "")
        found.append(Entrant(subject, target, partial(matrix.already_running, subject)))
    return found


async def configured_model(
    args: argparse.Namespace, client: http.Client
) -> tuple[Settings, str, settings.ModelSettings]:
    """The settings, and the model of them that is to be measured; raises `SettingsError`."""
    overrides: dict[str, Any] = {"pair": dict(args.pair)} if args.pair else {}
    read = settings.load(args.config, overrides, settings.environment())
    if not read.engines:
        found = await discovery.find(client, discovery.USUAL_PORTS, own_port=0)
        engines = {kind: settings.EngineSettings(urls=(url,)) for kind, url in found.items()}
        read = read.model_copy(update={"engines": engines})
    models = read.served()
    if not models:
        raise UsageError(
            "no model to measure: name one in the settings (--config), give one of each engine "
            "that runs (--pair), or any address (--target)"
        )
    name = args.model or max(models, key=lambda one: len(models[one].lanes))
    if name not in models:
        raise UsageError(f"there is no model {name}; there are: {', '.join(models)}")
    for kind in models[name].lanes:
        if kind not in read.engines:
            raise UsageError(
                f"{name} has a lane on {kind}, and no {kind} runs on its usual port: start it, or "
                f"say where it is in the settings (engines.{kind}.urls)"
            )
    return read, name, models[name]


def command_line(key: str | None = None) -> str:
    """The command that was called, without the key."""
    return shlex.join(["twolane", *shareable_command(sys.argv[1:], key)])

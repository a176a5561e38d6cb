"""The targets of a measurement: servers at any address, or a model of the settings."""

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


async def server_entrants(targets: Sequence[Target], client: http.Client) -> list[Entrant]:
    """Entrants for servers that run already, of which only the address is known."""
    entrants = []
    for target in targets:
        kind = await discovery.kind_of(client, target.url)
        subject = Subject(target.label, target.url, target.model, engine=kind or "")
        entrants.append(Entrant(subject, target, partial(matrix.already_running, subject)))
    return entrants


async def configured_model(
    args: argparse.Namespace, client: http.Client
) -> tuple[Settings, str, settings.ModelSettings]:
    """The settings, the public name of the model to measure, and its settings.

    Without configured engines, those that run on their usual ports are used.

    Raises:
        UsageError: There is no such model, or an engine of it is not found.
    """
    overrides: dict[str, Any] = {"pair": dict(args.pair)} if args.pair else {}
    read = settings.load(args.config, overrides, settings.environment())
    if not read.engines:
        urls = await discovery.find(client, discovery.USUAL_PORTS, own_port=0)
        engines = {kind: settings.EngineSettings(urls=(url,)) for kind, url in urls.items()}
        read = read.model_copy(update={"engines": engines})
    models = read.served()
    if not models:
        raise UsageError(
            "no model to measure: name the settings that have one (--config), or a model of each "
            "engine that runs (--pair), or the address of any server (--target)"
        )
    name = args.model or max(models, key=lambda known: len(models[known].lanes))
    if name not in models:
        raise UsageError(
            f"there is no model {name} in the settings; they have: {', '.join(models)}"
        )
    for kind in models[name].lanes:
        if kind not in read.engines:
            raise UsageError(
                f"{name} has a lane on {kind}, and no {kind} runs on its usual port: start it, or "
                f"write its address into the settings (engines.{kind}.urls)"
            )
    return read, name, models[name]


def command_line(key: str | None = None) -> str:
    """The command line of this process, without the key."""
    return shlex.join(["twolane", *shareable_command(sys.argv[1:], key)])

"""`twolane init`: a folder with all that `docker compose up` needs, and a configuration.

The files are those of the repository. In a checkout they lie at its root, in an installed wheel
in `gateway/box`. Only the Dockerfile is another one: it installs the wheel beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gateway import installation
from gateway.errors import UsageError

#: The files and folders to write, by their path in the folder, and their path in the repository.
BOX = {
    "compose.yaml": "compose.yaml",
    ".env": ".env.example",
    "twolane.yaml": "twolane.example.yaml",
    "deploy/Dockerfile": "deploy/Dockerfile.wheel",
    "deploy/await-room.sh": "deploy/await-room.sh",
    "deploy/pull.sh": "deploy/pull.sh",
    "deploy/pairs": "deploy/pairs",
    "deploy/prometheus": "deploy/prometheus",
    "deploy/grafana/dashboards": "deploy/grafana/dashboards",
    "deploy/grafana/provisioning": "deploy/grafana/provisioning",
}
DOCKERIGNORE = "# The image is made of these, and of nothing else.\n*\n!requirements.txt\n!*.whl\n"
API_KEYS = """\
# API keys of the gateway, one per line, at least 8 characters each. To add one:
#   openssl rand -hex 24 >>secrets/api_keys
# Clients send a key as `Authorization: Bearer KEY`; the chat page sends the first.
# Without a key anybody on this machine may use the gateway, and GATEWAY_BIND must stay 127.0.0.1.
"""
#: Never overwritten, not even with --force: they hold what cannot be had again.
SECRETS = {"secrets/api_keys": API_KEYS, "secrets/hf_token": ""}

REPORT = """\
{folder}: wrote {written}

Next, with Docker, on a machine with an NVIDIA driver:
  cd {folder}
  $EDITOR .env                                 # models, slots, context, ports
  docker compose --profile setup up --build    # downloads both models, then serves
  docker compose up -d                         # from then on

Or without Docker, with engines that run already:
  cd {folder}
  $EDITOR twolane.yaml                         # engines, models, keys
  {program} serve --config twolane.yaml

For another model, in {folder}:
  {program} plan MODEL --cards 2x24 --ram 96 --write --force    # .env and twolane.yaml
"""


def init(args: argparse.Namespace) -> None:
    """Write the folder and say what to do next.

    Raises:
        UsageError: A file is there already, no wheel is found, or the folder cannot be written.
    """
    folder: Path = args.folder
    wheel, requirement = _requirement(args.wheel)
    present = sorted(path for path in _paths() if (folder / path).exists())
    if present and not args.force:
        raise UsageError(
            f"{folder} has {', '.join(present)} already: name another folder, or overwrite with "
            "--force (keys in secrets/ are kept)"
        )
    try:
        _write(folder, requirement, wheel)
    except OSError as exc:
        raise UsageError(f"{exc.filename or folder} cannot be written: {exc.strerror}") from exc
    written = ", ".join(sorted({path.split("/")[0] for path in [*_paths(), *SECRETS]}))
    if wheel is not None:
        written += f", {wheel.name}"
    sys.stdout.write(
        REPORT.format(folder=folder, written=written, program=installation.program(folder))
    )


def _paths() -> Iterator[str]:
    """What is written anew each time, as paths within the folder."""
    yield from BOX
    yield ".dockerignore"
    yield "requirements.txt"


def _write(folder: Path, requirement: str, wheel: Path | None) -> None:
    source = box()
    for path, origin in BOX.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / origin).is_dir():
            shutil.copytree(source / origin, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / origin, target)
    (folder / ".dockerignore").write_text(DOCKERIGNORE)
    (folder / "requirements.txt").write_text(f"{requirement}\n")
    if wheel is not None and wheel.resolve().parent != folder.resolve():
        shutil.copyfile(wheel, folder / wheel.name)
    for path, text in SECRETS.items():
        secret = folder / path
        secret.parent.mkdir(exist_ok=True)
        if not secret.exists():
            secret.write_text(text)


def box() -> Path:
    """Where the files of the box lie: in the package, or at the root of a checkout."""
    packaged = Path(__file__).with_name("box")
    return packaged if packaged.exists() else installation.ROOT


def _requirement(named: Path | None) -> tuple[Path | None, str]:
    """The wheel to copy, if one is, and the line of requirements.txt that installs twolane.

    Without a named wheel it is the one that this installation was made from, or its version on
    the package index where that is its origin.

    Raises:
        UsageError: There is no such wheel.
    """
    wheel = named
    if wheel is None:
        text = importlib.metadata.distribution("twolane").read_text("direct_url.json")
        if text is None:
            return None, f"twolane=={installation.version()}"
        wheel = _local_wheel(json.loads(text))
    if wheel.suffix != ".whl" or not wheel.is_file():
        raise UsageError(
            f"there is no wheel {wheel}: make one with `uv build --wheel` in a checkout, and "
            "name it with --wheel FILE"
        )
    return wheel, f"./{wheel.name}"


def _local_wheel(origin: dict[str, object]) -> Path:
    """The file that twolane was installed from, from PEP 610's `direct_url.json`."""
    url = urlsplit(str(origin["url"]))
    if "archive_info" not in origin or url.scheme != "file":
        raise UsageError(
            f"twolane was installed from {url.geturl()}, which is no wheel: make one with "
            "`uv build --wheel` in a checkout, and name it with --wheel FILE"
        )
    return Path(unquote(url.path))

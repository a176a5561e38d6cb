"""What the archives hold, and that the wheel works where there is no checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import init, installation
from gateway.cli import main
from tests.support.checkout import build, clone

ROOT = Path(__file__).parents[1]
KEY = f"key-{os.getpid()}-of-somebody"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@dataclass(frozen=True)
class Archives:
    """Both archives, as `uv build` makes them: the wheel from the sdist's tree.

    Attributes:
        wheel: The file.
        installed: Where it is unpacked.
        in_wheel: Its files.
        in_sdist: The files of the sdist, without the folder that they are all in.
    """

    wheel: Path
    installed: Path
    in_wheel: frozenset[str]
    in_sdist: frozenset[str]

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the wheel's `twolane` in a folder; of this environment it has the dependencies."""
        program = f"import sys; sys.path.insert(0, {str(self.installed)!r}); import gateway.cli; "
        return subprocess.run(
            [sys.executable, "-P", "-c", program + "gateway.cli.main()", *arguments],
            cwd=folder,
            env={**os.environ, "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Made of a copy of what git tracks, and of a key and a model's file that it ignores."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    clone(source)
    (source / "secrets" / "api_keys").write_text(f"{KEY}\n")
    (source / "twolane.yaml").write_text(f"api_keys: [{KEY}]\n")
    (source / "notes.txt").write_text("what else lies in a checkout\n")
    sdist = build("sdist", source, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
        in_sdist = [name.partition("/")[2] for name in archive.getnames()]
    wheel = build("wheel", out / sdist.name.removesuffix(".tar.gz"), out)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "installed")  # noqa: S202 - our own
        in_wheel = archive.namelist()
    return Archives(wheel, out / "installed", frozenset(in_wheel), frozenset(in_sdist))


def below(folder: str, names: frozenset[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{folder}/")}


# The archives


@pytest.mark.integration
def test_no_archive_holds_a_key(archives: Archives) -> None:
    for names in (archives.in_sdist, archives.in_wheel):
        assert not [name for name in names if "secrets" in name]
    for path in archives.installed.parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


@pytest.mark.integration
def test_the_sdist_holds_what_git_tracks_and_nothing_else(archives: Archives) -> None:
    assert {"LICENSE", "README.md", "pyproject.toml", "uv.lock", "compose.yaml"} <= (
        archives.in_sdist
    )
    assert below("tests", archives.in_sdist)
    assert below("backends/fake", archives.in_sdist)
    assert not {"notes.txt", "twolane.yaml", ".env"} & archives.in_sdist


@pytest.mark.integration
def test_the_wheel_holds_the_program_and_no_fakes_benchmarks_or_tests(archives: Archives) -> None:
    folders = {name.split("/")[0] for name in archives.in_wheel}

    assert folders == {"backends", "gateway", "loadtests", f"twolane-{VERSION}.dist-info"}
    assert not below("backends/fake", archives.in_wheel)
    assert not below("loadtests/bench", archives.in_wheel)
    assert {f"{name}/py.typed" for name in ("backends", "gateway", "loadtests")} <= (
        archives.in_wheel
    )
    assert f"twolane-{VERSION}.dist-info/licenses/LICENSE" in archives.in_wheel


@pytest.mark.integration
def test_the_wheel_imports_nothing_that_is_left_out_of_it(archives: Archives) -> None:
    for path in archives.installed.rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        left_out = ("backends.fake", "loadtests.bench", "tests")
        assert not [n for n in imported if n.startswith(left_out)], path


@pytest.mark.integration
def test_the_wheel_holds_the_box_as_the_checkout_has_it(archives: Archives) -> None:
    for origin in init.BOX.values():
        files = [f for f in [ROOT / origin, *(ROOT / origin).rglob("*")] if f.is_file()]
        assert files, origin
        for file in files:
            packed = archives.installed / "gateway" / "box" / file.relative_to(ROOT)
            assert packed.read_bytes() == file.read_bytes()


# The version


def test_the_version_is_written_in_one_place_and_named_where_it_must_be() -> None:
    assert installation.version() == VERSION
    assert f"image: twolane:{VERSION}\n" in (ROOT / "compose.yaml").read_text()


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert (ended.value.code, capsys.readouterr().out) == (0, f"twolane {VERSION}\n")


def test_the_lock_has_one_fastapi_for_all_but_vllm() -> None:
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    [ours] = [package for package in locked if package["name"] == "twolane"]
    versions = {package["version"] for package in locked if package["name"] == "fastapi"}
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])

    wanted = [d for d in ours["dependencies"] if d["name"] == "fastapi"]
    with_dev = [d for d in ours["dev-dependencies"]["dev"] if d["name"] == "fastapi"]
    assert {d["version"] for d in with_dev} == {newest}
    for dependency in wanted:
        if dependency["version"] != newest:
            assert dependency["marker"] == "extra == 'extra-7-twolane-vllm'"


# The wheel, outside a checkout


@pytest.mark.integration
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--help"],
        ["compare", "--help"],
        ["doctor", "--help"],
        ["simulate", "--help"],
        ["calibrate", "--help"],
        ["plan", "llama-3.1-8b", "--cards", "2x24", "--ram", "96"],
        ["profile", "show"],
    ],
    ids=lambda words: words[0],
)
def test_the_commands_of_the_wheel_run(
    archives: Archives, tmp_path: Path, arguments: list[str]
) -> None:
    ended = archives.run(tmp_path, *arguments)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


@pytest.mark.integration
def test_the_wheel_looks_this_machine_over(archives: Archives, tmp_path: Path) -> None:
    ended = archives.run(tmp_path, "doctor", "--json")

    assert ended.returncode in (0, 1), ended.stderr
    assert json.loads(ended.stdout)["findings"]


@pytest.mark.integration
def test_a_message_names_the_command_that_adds_an_extra_here(
    archives: Archives, tmp_path: Path
) -> None:
    ask = "from gateway import installation as i; print(i.install('load')); print(i.program())"
    environment = Path(sys.prefix)

    def printed_lines(python_path: Path, path: str) -> list[str]:
        command = [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path.insert(0, {str(python_path)!r}); {ask}",
        ]
        ended = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return ended.stdout.splitlines()

    inactive, active = "/usr/bin:/bin", f"{environment}/bin:/usr/bin:/bin"
    [installed, program] = printed_lines(archives.installed, inactive)
    assert installed.endswith("'twolane[load]'")
    assert str(environment / "bin" / "python") in installed
    assert program == str(environment / "bin" / "twolane")
    [installed, program] = printed_lines(archives.installed, active)
    assert re.fullmatch(r"(uv )?pip install 'twolane\[load\]'", installed)
    assert program == "twolane"
    if environment == ROOT / ".venv":
        assert printed_lines(ROOT, active) == ["make load", "twolane"]


# twolane init


@pytest.mark.integration
def test_init_of_the_wheel_writes_all_that_compose_needs(
    archives: Archives, tmp_path: Path
) -> None:
    ended = archives.run(tmp_path, "init", "box", "--wheel", str(archives.wheel))
    box = tmp_path / "box"

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "docker compose --profile setup up" in ended.stdout
    assert (box / "requirements.txt").read_text() == f"./{archives.wheel.name}\n"
    assert (box / archives.wheel.name).read_bytes() == archives.wheel.read_bytes()
    assert (box / "secrets" / "hf_token").read_text() == ""
    mounted = re.findall(r"^ +- (\./[^:]+):", (box / "compose.yaml").read_text(), re.MULTILINE)
    files = re.findall(r"file: (\./\S+)\}", (box / "compose.yaml").read_text())
    assert mounted
    assert len(files) == 2
    for name in (*mounted, *files, "deploy/Dockerfile", ".env", ".dockerignore"):
        assert (box / name).exists(), name


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A file that is called a wheel."""
    file = tmp_path / "twolane-9-py3-none-any.whl"
    file.write_bytes(b"PK")
    return file


def test_init_overwrites_only_with_force_and_keeps_the_keys(
    tmp_path: Path, wheel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = tmp_path / "box"
    command = ["init", str(box), "--wheel", str(wheel)]
    main(command)
    (box / ".env").write_text("MODEL=mine\n")
    (box / "secrets" / "api_keys").write_text("a-long-secret\n")

    with pytest.raises(SystemExit) as refused:
        main(command)
    kept = (box / ".env").read_text()
    main([*command, "--force"])

    assert refused.value.code == 2
    assert ".env" in capsys.readouterr().err
    assert kept == "MODEL=mine\n"
    assert (box / ".env").read_text() == (ROOT / ".env.example").read_text()
    assert (box / "secrets" / "api_keys").read_text() == "a-long-secret\n"


def test_init_in_a_checkout_says_how_to_get_a_wheel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["init", str(tmp_path / "box")])

    assert refused.value.code == 2
    assert "uv build --wheel" in capsys.readouterr().err
    assert not (tmp_path / "box").exists()


def test_the_keys_example_is_what_init_writes() -> None:
    assert (ROOT / "secrets" / "api_keys.example").read_text() == init.API_KEYS


def test_both_images_differ_in_what_is_installed_only() -> None:
    ours, wheels = (
        (ROOT / "deploy" / name).read_text().split("\nFROM ${BASE}\n")[1]
        for name in ("Dockerfile", "Dockerfile.wheel")
    )

    assert ours == wheels

"""The box from `up` to `down`: it serves, an engine dies and returns, and nothing is left."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from backends.fake import DONE
from tests import compose
from tests.compose import KEY, Box
from tests.compose.conftest import Up
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(900)

ENGINES = ["ollama", "vllm"]
OTHER = {"ollama": "vllm", "vllm": "ollama"}


def text(answer: httpx.Response) -> str:
    """What an answer says; it must be whole."""
    assert answer.status_code == 200, answer.text
    assert answer.content.endswith(DONE), answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"]
    assert not any("error" in event for event in events), answer.text
    choices = [event["choices"][0] for event in events if event.get("choices")]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def lane(answer: httpx.Response) -> str:
    return answer.headers["x-gateway-lane"]


def holds(box: Box, engine: str) -> None:
    """Return when this engine has the GPU."""

    def held() -> bool:
        gpu = box.get("/status")["gpu"]
        return (gpu["step"], gpu["holder"]) == ("held", engine)

    wait_until(held, 120, describe=lambda: (box.get("/status")["gpu"], box.logs()))


def well(box: Box, engine: str) -> bool:
    """Whether the gateway would give this engine work."""
    [replica] = box.get("/status")["models"]["smollm2"]["lanes"][engine]["replicas"]
    return bool(replica["state"] == "ready")


def back(box: Box, engine: str) -> None:
    """Return when it has answered."""

    def answers() -> bool:
        answer = box.chat(f"smollm2@{engine}")
        return answer.status_code == 200 and bool(text(answer)) and lane(answer) == engine

    wait_until(answers, 240, describe=box.logs)


@pytest.fixture(scope="module")
def shared(up: Up) -> Box:
    """The same box after `PLACEMENT=shared`: both engines at once."""
    up.box.compose("up", "--detach", "--wait", "--no-deps", "gateway", PLACEMENT="shared")
    for engine in ENGINES:
        wait_until(lambda: well(up.box, engine), 60, describe=up.box.logs)  # noqa: B023 - waited for
    return up.box


# The models come first


def test_the_setup_downloads_both_models_and_prints_progress(up: Up) -> None:
    for puller in ("pull-ollama", "pull-vllm"):
        said = re.findall(rf"^{puller}-1 +\| (.*)$", up.setup, re.MULTILINE)
        assert " downloaded | " in said[0]
        assert re.fullmatch(r"\d+M downloaded: done", said[-1])


def test_no_engine_starts_before_its_model_is_downloaded(up: Up) -> None:
    lines = up.setup.splitlines()
    done = next(i for i, line in enumerate(lines) if re.search("pull-vllm.*downloaded: done", line))

    assert not any(line.startswith("vllm-1") for line in lines[:done])


# One holds the cards at a time


def test_it_is_up_before_the_engines_and_says_what_it_waits_for(up: Up) -> None:
    [(status, said)] = [(s, said) for s, said in up.waited if said["gpu"]["step"] == "loading"]

    assert status == 503
    assert said["gpu"]["to"] == "vllm"
    assert said["ready"] is False


def test_an_early_request_receives_the_state_and_then_its_answer(up: Up) -> None:
    answer = up.early.result(120)

    assert text(answer)
    assert lane(answer) == "vllm"
    assert "The GPU goes to vllm: loading" in answer.text


def test_ollama_loads_nothing_before_vllm_has_started(up: Up) -> None:
    passages = up.box.get("/status")["gpu"]["passages"]

    assert [(p["from"], p["to"], p["outcome"]) for p in passages] == [(None, "vllm", "done")]
    assert up.box.inside("ollama", "ollama", "ps").stdout.count("\n") == 1, "the table's head"


def test_the_cards_pass_from_one_engine_to_the_other_and_back(up: Up) -> None:
    served = []
    for engine in ENGINES:
        assert up.box.post("/admin/pin", {"lane": engine}).status_code == 200
        holds(up.box, engine)
        answer = up.box.chat()
        asleep = up.box.inside("vllm", "curl", "-s", "http://127.0.0.1:8000/is_sleeping").stdout
        served.append((lane(answer), bool(text(answer)), json.loads(asleep)["is_sleeping"]))
    up.box.post("/admin/pin", {"lane": "auto"})

    assert served == [("ollama", True, True), ("vllm", True, False)]


def test_the_chat_page_knows_the_model_and_gets_an_answer(up: Up) -> None:
    url = f"http://127.0.0.1:{up.box.page}/api/"
    with httpx.Client(base_url=url, trust_env=False, timeout=120) as page:
        nobody = {"email": "", "password": ""}  # it asks nobody to log in
        token = page.post("v1/auths/signin", json=nobody).json()["token"]
        page.headers["authorization"] = f"Bearer {token}"
        [model] = page.get("models").json()["data"]
        question = {"role": "user", "content": "Say hello in one sentence."}
        asked = {"model": model["id"], "messages": [question], "stream": False, "max_tokens": 16}
        answer = page.post("chat/completions", json=asked).json()

    assert model["id"] == "smollm2"
    assert model["loaded"] is True
    assert answer["choices"][0]["message"]["content"]


# Who reaches what


def test_a_request_without_a_key_is_refused(up: Up) -> None:
    with up.box.client(key="") as client:
        answers = [client.post(compose.CHAT, json={}), client.get("/status")]

    assert [answer.status_code for answer in answers] == [401, 401]


def test_only_the_gateway_is_published_and_only_on_this_machine(up: Up) -> None:
    published = {
        name: [port for ports in bound.values() for port in ports or ()]
        for name in ("gateway", *ENGINES)
        if (bound := up.box.container(name)["NetworkSettings"]["Ports"]) is not None
    }

    assert published == {
        "gateway": [{"HostIp": "127.0.0.1", "HostPort": str(up.box.port)}],
        "ollama": [],
        "vllm": [],
    }


def test_the_engines_are_on_a_network_without_a_way_out(up: Up) -> None:
    for engine in ENGINES:
        networks = list(up.box.container(engine)["NetworkSettings"]["Networks"])
        assert networks == [f"{up.box.project}_engines"]

    outside = ["--network", f"{up.box.project}_outside", compose.BASE]
    reached = {
        name: compose.docker("run", "--rm", *outside, "curl", "-s", "-m", "3", f"http://{url}")
        for name, url in {
            "gateway": "gateway:8000/health",
            "ollama": "ollama:11434/api/version",
            "vllm": "vllm:8000/health",
        }.items()
    }

    assert {name: said.returncode == 0 for name, said in reached.items()} == {
        "gateway": True,
        "ollama": False,
        "vllm": False,
    }


def test_the_gateway_has_no_rights_writes_nowhere_and_has_no_keys_in_its_environment(
    up: Up,
) -> None:
    container = up.box.container("gateway")
    status = up.box.inside("gateway", "cat", "/proc/1/status").stdout
    written = up.box.inside("gateway", "touch", "/opt/twolane/x")

    assert container["HostConfig"]["ReadonlyRootfs"]
    assert up.box.inside("gateway", "id", "-u").stdout.strip() == "10001"
    assert "Read-only file system" in written.stderr
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert KEY not in json.dumps(container["Config"])
    assert "docker.sock" not in json.dumps(container["Mounts"])


# Both at once


@pytest.mark.parametrize("engine", ENGINES)
def test_each_lane_streams_an_answer(shared: Box, engine: str) -> None:
    answer = shared.chat(f"smollm2@{engine}")

    assert text(answer)
    assert lane(answer) == engine


# What Prometheus and the dashboard see of it


@pytest.fixture
def prometheus(up: Up) -> Iterator[httpx.Client]:
    """The API of the one in the profile, which has looked on from the start."""
    url = f"http://127.0.0.1:{up.box.prometheus}/api/v1/"
    with httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def asked(prometheus: httpx.Client, path: str, **about: str) -> Any:
    """What it says."""
    said = prometheus.get(path, params=about).json()
    assert said["status"] == "success", said
    return said["data"]


def test_prometheus_reaches_the_gateway_and_vllm(prometheus: httpx.Client) -> None:
    def health() -> dict[str, str]:
        targets = asked(prometheus, "targets")["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in targets}

    wait_until(lambda: health() == {"twolane": "up", "vllm": "up"}, 30, describe=health)


def test_prometheus_has_loaded_the_alerts_and_none_of_them_fires(prometheus: httpx.Client) -> None:
    def rules() -> list[tuple[str, str]]:
        [group] = asked(prometheus, "rules")["groups"]
        return [(rule["name"], rule["health"]) for rule in group["rules"]]

    wait_until(lambda: {health for _, health in rules()} == {"ok"}, 30, describe=rules)

    assert [name for name, _ in rules()] == [
        "TwolaneServesNobody",
        "TwolaneRequestsFail",
        "TwolaneModelOnCpu",
    ]
    assert not [a for a in asked(prometheus, "alerts")["alerts"] if a["state"] == "firing"]


def test_every_panel_of_the_dashboard_has_something_to_show(
    shared: Box, prometheus: httpx.Client
) -> None:
    read = json.loads((compose.ROOT / "deploy/grafana/dashboards/twolane.json").read_text())
    queries = [target["expr"] for panel in read["panels"] for target in panel.get("targets", ())]
    ours = {query for query in queries if "twolane_gpu_" not in query or "holder" in query}

    def empty() -> set[str]:
        now = time.time()
        span = {"start": f"{now - 600}", "end": f"{now}", "step": "5"}
        return {
            query
            for query in ours
            if not asked(prometheus, "query_range", query=filled(query), **span)["result"]
        }

    wait_until(lambda: not empty(), 60, describe=empty)
    assert len(queries) > len(ours), "the cards', of which there are none here"


def filled(query: str) -> str:
    return query.replace("$model", ".*").replace("$__rate_interval", "20s")


# Each may die


@pytest.mark.parametrize("engine", ENGINES)
def test_a_crashed_engine_costs_no_answer_and_is_restarted(shared: Box, engine: str) -> None:
    before = shared.container(engine)
    shared.crash(engine)
    answers = [shared.chat() for _ in range(6)]
    back(shared, engine)
    after = shared.container(engine)

    assert all(text(answer) for answer in answers)  # Ollama may be back before the second
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["Id"] == before["Id"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_killed_by_hand_is_left_out_until_it_is_started(shared: Box, engine: str) -> None:
    shared.compose("kill", engine)
    answers = [shared.chat() for _ in range(3)]
    refused = shared.chat(f"smollm2@{engine}")
    shared.compose("start", engine)
    back(shared, engine)

    assert [(lane(answer), bool(text(answer))) for answer in answers] == [(OTHER[engine], True)] * 3
    assert refused.status_code == 503
    assert "cannot be reached" in refused.json()["error"]["message"]


# Ending


def test_a_stop_lets_the_running_answer_end(shared: Box) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(shared.chat, "smollm2@ollama", max_tokens=200, min_tokens=100)
        wait_until(lambda: shared.get("/status")["in_flight"] == 1, 20, describe=shared.logs)
        shared.compose("stop", "gateway")
        answer = asked.result(60)
    ended = shared.container("gateway")["State"]
    shared.compose("up", "--detach", "--wait", "--no-deps", "gateway", PLACEMENT="shared")

    assert text(answer)
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False)


def test_a_stop_works_in_the_first_moment_of_the_process(shared: Box) -> None:
    shared.compose("stop", "gateway")
    shared.compose("start", "gateway")
    shared.compose("stop", "gateway")

    # 137 is Docker's SIGKILL, after the whole grace period.
    assert shared.container("gateway")["State"]["ExitCode"] != 137


def test_down_leaves_nothing_behind(shared: Box) -> None:
    there = shared.left()
    shared.compose("--profile", "*", "down", "--volumes", "--timeout", "40")

    assert {kind: bool(names) for kind, names in there.items()} == {
        "containers": True,
        "networks": True,
        "volumes": True,
    }
    assert shared.left() == {"containers": [], "networks": [], "volumes": []}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", shared.port)) != 0

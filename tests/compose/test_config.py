"""What compose itself makes of the file, in every profile."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from gateway import settings
from tests import compose

PROFILES: list[tuple[str, ...]] = [(), ("setup",), ("metrics",), ("setup", "metrics")]
SERVING = {"gateway", "ollama", "vllm", "open-webui"}
PULLS = {"pull-ollama", "pull-vllm"}
METRICS = {"prometheus", "grafana"}

pytestmark = pytest.mark.usefixtures("compose_itself")


@pytest.fixture(scope="module", params=PROFILES, ids=lambda chosen: "+".join(chosen) or "none")
def read(request: pytest.FixtureRequest, compose_itself: None) -> dict[str, Any]:
    return compose.configuration(*request.param)


def services(read: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read["services"]
    return found


def test_each_profile_has_its_services() -> None:
    found = {chosen: set(services(compose.configuration(*chosen))) for chosen in PROFILES}

    assert found[()] == SERVING
    assert found["setup",] == SERVING | PULLS
    assert found["metrics",] == SERVING | METRICS
    assert found["setup", "metrics"] == SERVING | PULLS | METRICS


def test_ports_are_bound_to_this_machine_and_engines_have_none(read: dict[str, Any]) -> None:
    published = {
        name: [(port["host_ip"], port["published"]) for port in service.get("ports", ())]
        for name, service in services(read).items()
    }

    assert {name for name, ports in published.items() if ports} <= {
        "gateway", "open-webui", "prometheus", "grafana",
    }  # fmt: skip
    assert {host for ports in published.values() for host, _ in ports} == {"127.0.0.1"}


def test_the_published_address_and_port_are_variables() -> None:
    read = compose.configuration("metrics", GATEWAY_BIND="192.0.2.1", GATEWAY_PORT="9000")
    hosts = {
        port["host_ip"] for service in services(read).values() for port in service.get("ports", ())
    }

    assert hosts == {"192.0.2.1"}
    assert services(read)["gateway"]["ports"][0]["published"] == "9000"


def test_the_engines_are_on_a_network_without_a_way_out(read: dict[str, Any]) -> None:
    assert read["networks"]["engines"]["internal"] is True
    for engine in ("ollama", "vllm"):
        assert set(services(read)[engine]["networks"]) == {"engines"}
    for name in PULLS & set(services(read)):
        assert set(services(read)[name]["networks"]) == {"outside"}
    assert not read["networks"]["outside"].get("internal")


def test_no_service_has_the_docker_socket_or_the_hosts_rights(read: dict[str, Any]) -> None:
    for service in services(read).values():
        mounted = [volume.get("source", "") for volume in service.get("volumes", ())]
        assert not any("docker" in Path(source).name for source in mounted)
        assert not service.get("privileged")
        assert service.get("network_mode") != "host"


def test_the_gateway_has_no_capabilities_and_a_read_only_root(read: dict[str, Any]) -> None:
    gateway = services(read)["gateway"]

    assert gateway["read_only"] is True
    assert gateway["cap_drop"] == ["ALL"]
    assert gateway["security_opt"] == ["no-new-privileges:true"]
    assert [secret["source"] for secret in gateway["secrets"]] == ["api_keys"]


def test_the_engines_have_the_cards_and_the_gateway_has_nvml(read: dict[str, Any]) -> None:
    asked = {
        name: set(service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"])
        for name, service in services(read).items()
        if "deploy" in service
    }

    assert asked == {"ollama": {"gpu"}, "vllm": {"gpu"}, "gateway": {"gpu", "utility"}}


def test_vllm_can_pin_and_share_memory_and_its_caches_are_volumes(read: dict[str, Any]) -> None:
    vllm = services(read)["vllm"]
    kept = {v["target"] for v in vllm["volumes"] if v["type"] == "volume"}

    assert vllm["ulimits"] == {"memlock": -1}
    assert vllm["ipc"] == "host"
    assert kept == {"/root/.cache/huggingface", "/root/.cache/vllm"}
    assert vllm["environment"]["VLLM_SERVER_DEV_MODE"] == "1"
    assert vllm["environment"]["NCCL_P2P_DISABLE"] == "1"
    assert vllm["healthcheck"]["start_period"] == "15m0s"


def test_tensor_or_pipeline_parallel_is_a_choice() -> None:
    def ranks(**variables: str) -> tuple[str, str]:
        words = services(compose.configuration(**variables))["vllm"]["command"]
        tensor = words[words.index("--tensor-parallel-size") + 1]
        return tensor, words[words.index("--pipeline-parallel-size") + 1]

    assert ranks() == ("2", "1")
    assert ranks(VLLM_TENSOR_PARALLEL="1", VLLM_PIPELINE_PARALLEL="2") == ("1", "2")


def test_extra_arguments_come_last_so_that_they_win() -> None:
    words = services(compose.configuration(VLLM_EXTRA_ARGS="--dtype bfloat16"))["vllm"]["command"]

    assert words[-2:] == shlex.split("--dtype bfloat16")


def test_ollama_has_every_setting_whose_default_is_unsuitable(read: dict[str, Any]) -> None:
    told = services(read)["ollama"]["environment"]

    assert {
        "OLLAMA_CONTEXT_LENGTH", "OLLAMA_NUM_PARALLEL", "OLLAMA_KV_CACHE_TYPE",
        "OLLAMA_FLASH_ATTENTION", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_NO_CLOUD",
    } <= set(told)  # fmt: skip
    assert told["OLLAMA_KEEP_ALIVE"] == "-1"


def test_only_the_chat_page_waits_for_the_gateways_health(read: dict[str, Any]) -> None:
    waits = {
        (name, on)
        for name, service in services(read).items()
        for on, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }

    assert waits == {("open-webui", "gateway")}


def test_models_are_downloaded_into_the_volumes_that_the_engines_read(read: dict[str, Any]) -> None:
    def volumes(name: str) -> set[tuple[str, str]]:
        mounts = services(read)[name]["volumes"]
        return {(v["source"], v["target"]) for v in mounts if v["type"] == "volume"}

    for engine in ("ollama", "vllm"):
        if f"pull-{engine}" in services(read):
            waits = services(read)[engine]["depends_on"][f"pull-{engine}"]
            assert volumes(f"pull-{engine}") <= volumes(engine)
            assert waits["condition"] == "service_completed_successfully"


def test_the_gateway_reads_the_settings_that_compose_passes(
    read: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "twolane.yaml"
    file.write_text(services(read)["gateway"]["environment"]["SETTINGS"])

    told = settings.load(file, {}, {})

    assert list(told.models) == ["llama-3.3-70b"]
    assert told.api_keys_file == Path("/run/secrets/api_keys")

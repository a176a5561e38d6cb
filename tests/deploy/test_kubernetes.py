"""The manifests: held to Kubernetes' own schemas, strictly, and to what the gateway needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes_validate import utils as schemas

from gateway import settings
from gateway.serve import LAST_WORD_S
from gateway.settings import Settings, SettingsError
from tests.support.units import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
#: The oldest whose pods can pause before they stop without a shell, and the newest we know.
VERSIONS = ("1.30", "1.37")


def manifests() -> dict[tuple[str, str], Any]:
    """Each object of the files that the kustomization names, by kind and name."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    objects = [o for name in listed for o in yaml.safe_load_all((KUBERNETES / name).read_text())]
    return {(made["kind"], made["metadata"]["name"]): made for made in objects}


def validate(made: Any) -> None:
    """Raise where a field is misspelt, missing or of another type, in any of the versions."""
    for version in VERSIONS:
        assert schemas.validate(made, version, strict=True) == version


def gateway() -> Any:
    """The gateway's pod."""
    return manifests()["Deployment", "twolane"]["spec"]["template"]["spec"]


def values() -> Any:
    return yaml.safe_load((KUBERNETES / "vllm.values.yaml").read_text())


def configured() -> Settings:
    return settings.load(KUBERNETES / "twolane.yaml", {}, {})


@pytest.mark.parametrize("name", sorted(manifests()), ids="/".join)
def test_every_object_matches_the_schemas_of_kubernetes(name: tuple[str, str]) -> None:
    validate(manifests()[name])


def test_the_schemas_reject_a_misspelt_field() -> None:
    made = manifests()["Deployment", "twolane"]
    pod = made["spec"]["template"]["spec"]
    pod["terminationGracePeriodSecond"] = pod.pop("terminationGracePeriodSeconds")

    with pytest.raises(schemas.ValidationError, match="terminationGracePeriodSecond"):
        validate(made)


@pytest.mark.integration
def test_the_output_of_kustomize_is_consistent() -> None:
    kustomize = shutil.which("kubectl")
    if not kustomize:
        pytest.skip("no kubectl on this machine")
    made = subprocess.run(
        [kustomize, "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=True
    )
    objects = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(made.stdout)}
    [(_, config)] = [key for key in objects if key[0] == "ConfigMap"]
    pod = objects["Deployment", "twolane"]["spec"]["template"]["spec"]

    for one in objects.values():
        validate(one)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "twolane"
    assert pod["volumes"][0]["configMap"]["name"] == config != "twolane"
    assert pod["containers"][0]["image"] == "twolane:0.1.0"
    assert yaml.safe_load(objects["ConfigMap", config]["data"]["twolane.yaml"])["models"]


def test_an_update_never_runs_two_gateways() -> None:
    spec = manifests()["Deployment", "twolane"]["spec"]

    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}


def test_the_grace_period_is_longer_than_the_drain() -> None:
    [container] = gateway()["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = configured().limits.drain_s + LAST_WORD_S

    assert gateway()["terminationGracePeriodSeconds"] > pause + drain + 5


def test_the_gateway_runs_without_root_on_a_read_only_filesystem() -> None:
    [container] = gateway()["containers"]
    security = gateway()["securityContext"] | container["securityContext"]

    assert security["runAsNonRoot"]
    assert security["runAsUser"] == 10001  # as in deploy/Dockerfile
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not gateway()["automountServiceAccountToken"]


def test_the_service_variables_of_kubernetes_would_be_misspelt_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = {"TWOLANE_PORT": "tcp://10.0.0.1:8000", "TWOLANE_SERVICE_HOST": "10.0.0.1"}
    for name, value in links.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match="TWOLANE_SERVICE_HOST"):
        settings.load(None, {}, links)
    assert gateway()["enableServiceLinks"] is False


def mounts(pod: Any) -> Iterator[tuple[str, Any]]:
    """Each path in the container, and the volume that is there."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for mount in pod["containers"][0]["volumeMounts"]:
        yield mount["mountPath"], volumes[mount["name"]]


def test_the_keys_are_mounted_where_the_settings_expect_them() -> None:
    places = dict(mounts(gateway()))
    keys = configured().api_keys_file
    assert keys is not None

    assert places[os.fspath(keys.parent)]["secret"]["secretName"] == "twolane-keys"
    assert places["/etc/twolane"]["configMap"]["name"] == "twolane"
    assert gateway()["containers"][0]["args"][-1] == "/etc/twolane/twolane.yaml"


def test_the_settings_match_the_engines() -> None:
    read = configured()
    [model] = read.models.values()
    [engine] = values()["servingEngineSpec"]["modelSpec"]
    pod = manifests()["Deployment", "ollama"]["spec"]["template"]["spec"]
    asked = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}

    assert model.placement == "shared"  # a card belongs to one pod
    # helm install vllm …: RELEASE-NAME-engine-service, as in the chart's templates.
    assert read.engines["vllm"].urls == (f"http://vllm-{engine['name']}-engine-service",)
    assert read.engines["ollama"].urls == ("http://ollama:11434",)
    assert ("Service", "ollama") in manifests()
    assert model.lanes["vllm"].slots == engine["vllmConfig"]["maxNumSeqs"]
    assert model.lanes["vllm"].context == engine["vllmConfig"]["maxModelLen"]
    assert f"--served-model-name={model.lanes['vllm'].model}" in engine["vllmConfig"]["extraArgs"]
    assert model.lanes["ollama"].slots == int(asked["OLLAMA_NUM_PARALLEL"])
    assert model.lanes["ollama"].context == int(asked["OLLAMA_CONTEXT_LENGTH"])


def test_the_values_of_the_chart_suit_two_cards() -> None:
    serving = values()["servingEngineSpec"]
    [engine] = serving["modelSpec"]
    probe = serving["startupProbe"]

    assert serving["strategy"] == {"type": "Recreate"}
    assert engine["vllmConfig"]["tensorParallelSize"] == engine["requestGPU"] == 2
    assert engine["shmSize"] == "20Gi"
    assert engine["replicaCount"] == 1
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 1800
    assert values()["routerSpec"] == {"enableRouter": False}


def test_only_the_gateway_can_reach_the_engines() -> None:
    policy = manifests()["NetworkPolicy", "engines"]["spec"]
    pods = {
        name: made["spec"]["template"]["metadata"]["labels"]
        for (kind, name), made in manifests().items()
        if kind == "Deployment"
    }
    [rule] = policy["ingress"]
    [source] = rule["from"]

    assert policy["podSelector"]["matchLabels"].items() <= pods["ollama"].items()
    assert not policy["podSelector"]["matchLabels"].items() <= pods["twolane"].items()
    assert source == {"podSelector": {"matchLabels": pods["twolane"]}}
    assert {port["port"] for port in rule["ports"]} == {8000, 11434}
    # And they are there for nobody outside the cluster.
    services = [made["spec"] for (kind, _), made in manifests().items() if kind == "Service"]
    assert {spec.get("type", "ClusterIP") for spec in services} == {"ClusterIP"}

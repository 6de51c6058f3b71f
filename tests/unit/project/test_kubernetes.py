"""deploy/kubernetes: against Kubernetes' own schemas, which the package kubernetes-validate
carries, and against ourselves. Kinds of cert-manager and of the Prometheus Operator are in neither:
test_overlays.py looks at them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from engine_cli.main import COMMANDS, engines
from engine_loader.integrations.config import IntegrationConfig
from tests.support.checkout import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.32", "1.37")  # the oldest that these are for, and the newest that the package knows
DRAIN_S = 25  # what `engines register` gives to running loads

Manifest = dict[str, Any]


def _read() -> Iterator[tuple[str, Manifest]]:
    for path in sorted(FOLDER.rglob("*.yaml")):
        if path.name == "kustomization.yaml":
            continue
        for document in yaml.safe_load_all(path.read_text()):
            yield (
                f"{path.relative_to(FOLDER)}:{document['kind']}/{document['metadata']['name']}",
                document,
            )


EVERYTHING = dict(_read())
FOREIGN = ("cert-manager.io/v1", "monitoring.coreos.com/v1")
MANIFESTS = {name: each for name, each in EVERYTHING.items() if each["apiVersion"] not in FOREIGN}


def pods() -> dict[str, tuple[dict[str, str], Manifest]]:
    """The labels and the spec of every pod that the manifests make."""
    found = {}
    for name, manifest in MANIFESTS.items():
        source = manifest if manifest["kind"] == "Pod" else manifest.get("spec", {}).get("template")
        if source:
            found[name] = (source["metadata"]["labels"], source["spec"])
    return found


def containers() -> dict[str, tuple[str, Manifest]]:
    """Every container, and the pod that it is in."""
    return {
        f"{name}:{container['name']}": (name, container)
        for name, (_, spec) in pods().items()
        for container in [*spec.get("initContainers", []), *spec["containers"]]
    }


OURS = {
    name: container
    for name, (_, container) in containers().items()
    if "engine-registry:" in container["image"]
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest_is_valid(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


@pytest.mark.parametrize("name", pods())
def test_a_field_that_kubernetes_does_not_know_is_found(name: str) -> None:
    wrong = copy.deepcopy(MANIFESTS[name])
    spec = wrong["spec"] if wrong["kind"] == "Pod" else wrong["spec"]["template"]["spec"]
    spec["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", OURS)
def test_every_engines_command_is_one_that_this_version_takes(name: str) -> None:
    takes(OURS[name]["args"])
    if "readinessProbe" in OURS[name] and "exec" in OURS[name]["readinessProbe"]:
        program, *args = OURS[name]["readinessProbe"]["exec"]["command"]
        assert program == "engines"
        takes(args)


def takes(line: list[str]) -> None:
    command, *args = (
        re.sub(r"\$\(POD_IP\)", "10.0.0.1", argument).replace("$(RANK)", "0") for argument in line
    )
    assert command in COMMANDS
    found = engines.get_command(click.Context(engines), command)
    assert found is not None
    found.make_context(command, args)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_has_settings_that_its_integration_takes(engine: str) -> None:
    name = f"engines/servers/{engine}.yaml:Deployment/{engine}:{engine}"
    args = containers()[name][1]["args"]
    settings = json.loads(args[args.index("--model-loader-extra-config") + 1])
    assert IntegrationConfig.of(settings).host == "$(POD_IP)"


@pytest.mark.parametrize("name", containers())
def test_what_a_container_refers_to_is_there(name: str) -> None:
    pod, container = containers()[name]
    known: set[str] = set()
    for variable in container.get("env", []):
        assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known, variable
        known.add(variable["name"])
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", [])))) <= known
    volumes = {volume["name"] for volume in pods()[pod][1].get("volumes", [])}
    volumes |= {
        claim["metadata"]["name"]
        for claim in MANIFESTS[pod]["spec"].get("volumeClaimTemplates", [])
    }
    assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "httpGet" in container.get(probe, {}):
            assert container[probe]["httpGet"]["port"] in ports


@pytest.mark.parametrize(
    "name", [name for name, manifest in MANIFESTS.items() if manifest["kind"] != "NetworkPolicy"]
)
def test_every_selector_finds_a_pod(name: str) -> None:
    spec = MANIFESTS[name].get("spec", {})
    selector = spec.get("selector")
    if not selector or MANIFESTS[name]["kind"] == "Job":
        return
    wanted = selector.get("matchLabels", selector)
    assert any(wanted.items() <= labels.items() for labels, _ in pods().values())


def test_a_pod_that_talks_to_etcd_is_let_in_to_it() -> None:
    for name, (labels, spec) in pods().items():
        talks = any(
            "etcd.engine-registry.svc:2379" in str(container)
            for container in spec["containers"] + spec.get("initContainers", [])
        )
        assert (labels.get("engine-registry/etcd") == "client") == talks, name


def test_a_pod_that_reads_or_serves_weights_is_let_in_to_its_peers_and_only_they_are() -> None:
    for name, (pod, container) in containers().items():
        if name in OURS:
            moves_weights = container["args"][0] in ("register", "load")
            assert (pods()[pod][0].get("engine-registry/transfer") == "peer") == moves_weights, name
    policy = MANIFESTS["engines/ranks/network-policy.yaml:NetworkPolicy/transfer-peers-only"][
        "spec"
    ]
    assert policy["podSelector"] == {"matchLabels": {"engine-registry/transfer": "peer"}}
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        (source,) = rule["from"]
        everything = "ports" not in rule
        labels = source.get("podSelector", {}).get("matchLabels", {})
        assert everything == (
            labels in ({"engine-registry/transfer": "peer"}, {"app.kubernetes.io/name": "gateway"})
        )


def test_a_rank_is_not_pid_1_and_has_the_time_to_drain() -> None:
    ranks = [
        pods()[pod][1]
        for name, (pod, container) in containers().items()
        if name in OURS and container["args"][0] == "register"
    ]
    assert ranks
    for spec in ranks:
        assert spec["shareProcessNamespace"] is True
        assert spec["terminationGracePeriodSeconds"] > DRAIN_S


def test_every_pod_runs_without_privileges() -> None:
    for name, (_, spec) in pods().items():
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["automountServiceAccountToken"] is False, name
    for name, (_, container) in containers().items():
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        if "inference-engine" not in container["image"]:  # somebody else's
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name


def test_the_members_of_etcd_are_those_that_the_stateful_set_makes() -> None:
    manifest = MANIFESTS["base/etcd.yaml:StatefulSet/etcd"]
    spec = manifest["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    members = dict(member.split("=", 1) for member in env["ETCD_INITIAL_CLUSTER"].split(","))
    names = [f"{manifest['metadata']['name']}-{number}" for number in range(spec["replicas"])]
    assert members == {
        name: env["ETCD_INITIAL_ADVERTISE_PEER_URLS"].replace("$(POD_NAME)", name) for name in names
    }
    domain = f".{spec['serviceName']}.{manifest['metadata']['namespace']}.svc:"
    assert all(domain in address for address in members.values())
    assert f"image: {container['image']}\n" in (ROOT / "docker-compose.yml").read_text()


def test_the_page_on_etcd_has_the_settings_of_the_manifest() -> None:
    (container,) = MANIFESTS["base/etcd.yaml:StatefulSet/etcd"]["spec"]["template"]["spec"][
        "containers"
    ]
    env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    page = (ROOT / "docs" / "how-to" / "run-etcd.md").read_text("utf-8")
    settings = dict(re.findall(r"^\| `--([a-z-]+)` \| `([^`]+)`", page, re.MULTILINE))
    assert "quota-backend-bytes" in settings
    assert settings == {name: env[f"ETCD_{name.upper().replace('-', '_')}"] for name in settings}


def test_the_page_on_kubernetes_names_every_secret_and_every_file() -> None:
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text("utf-8")
    secrets = {
        volume["secret"]["secretName"]
        for _, spec in pods().values()
        for volume in spec.get("volumes", [])
        if "secret" in volume
    }
    assert secrets
    assert [secret for secret in secrets if f"| `{secret}` |" not in page] == []
    files = {name.partition(":")[0] for name in MANIFESTS}
    folders = {str(path.parent.relative_to(FOLDER)) for path in FOLDER.rglob("kustomization.yaml")}
    named = files | (folders - {"base", "engines/ranks", "engines/servers"})
    assert [name for name in sorted(named) if f"| `{name}` |" not in page] == []

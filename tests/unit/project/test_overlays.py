"""deploy/kubernetes/overlays: they render, and what cert-manager and the Prometheus Operator get
fits the pods.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.checkout import ROOT
from tests.support.kustomize import Manifest, render
from tests.unit.project.test_kubernetes import FOREIGN, VERSIONS
from tests.unit.project.test_monitoring import CONFIG

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = {path.name: render(path) for path in sorted((FOLDER / "overlays").iterdir())}
COMPLETE = [*OVERLAYS["production"], *OVERLAYS["engines-cuda"]]


def of_kind(kind: str, manifests: list[Manifest] = COMPLETE) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def pods(manifests: list[Manifest]) -> list[tuple[str, dict[str, str], Manifest]]:
    """Namespace, labels and spec."""
    found = []
    for each in manifests:
        pod = each if each["kind"] == "Pod" else each.get("spec", {}).get("template")
        if pod:
            found.append((each["metadata"]["namespace"], pod["metadata"]["labels"], pod["spec"]))
    return found


def values(key: str, where: Any) -> list[Any]:
    """All that stands under this key, however deep."""
    if isinstance(where, list):
        return [value for each in where for value in values(key, each)]
    if not isinstance(where, dict):
        return []
    return [
        found
        for name, value in where.items()
        for found in ([value] if name == key else values(key, value))
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid_and_has_nothing_twice(overlay: str) -> None:
    manifests = OVERLAYS[overlay]
    for each in manifests:
        if each["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    namespaces = [each["metadata"].get("namespace") for each in manifests]
    assert len(set(zip(names, namespaces, strict=True))) == len(names)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl to compare with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_an_overlay_so(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(FOLDER / "overlays" / overlay)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr

    def ordered(manifests: Any) -> list[str]:
        return sorted(yaml.safe_dump(each) for each in manifests)

    assert ordered(yaml.safe_load_all(ran.stdout)) == ordered(OVERLAYS[overlay])


def test_an_overlay_sets_our_image_everywhere() -> None:
    for overlay, tag in (("engines-cpu", "0.1.0"), ("engines-cuda", "0.1.0-cuda13")):
        images = values("image", OVERLAYS[overlay])
        ours = {image for image in images if "/engine-registry:" in image}
        assert ours == {f"registry.example.com/engine-registry:{tag}"}


def test_cert_manager_makes_every_certificate_that_a_pod_mounts() -> None:
    made = {
        (each["metadata"]["namespace"], each["spec"]["secretName"])
        for each in of_kind("Certificate")
    }
    mounted = {
        (namespace, volume["secret"]["secretName"])
        for namespace, _, spec in pods(COMPLETE)
        for volume in spec.get("volumes", [])
        if "secret" in volume
    }
    assert made - mounted == {("cert-manager", "engine-registry-ca")}
    assert mounted <= made


def test_each_certificate_has_an_issuer_and_all_come_from_one_authority() -> None:
    issuers = {each["metadata"]["name"]: each["spec"] for each in of_kind("ClusterIssuer")}
    for each in of_kind("Certificate"):
        wanted = "engine-registry-root" if each["spec"].get("isCA") else "engine-registry"
        assert each["spec"]["issuerRef"]["name"] == wanted
    assert issuers["engine-registry"] == {"ca": {"secretName": "engine-registry-ca"}}


def test_the_certificate_of_etcd_names_each_member_and_the_service() -> None:
    (etcd,) = (each for each in of_kind("Certificate") if each["spec"]["commonName"] == "etcd")
    (members,) = (each for each in of_kind("StatefulSet") if each["metadata"]["name"] == "etcd")
    (container,) = members["spec"]["template"]["spec"]["containers"]
    env = {each["name"]: each.get("value", "") for each in container["env"]}
    hosts = {
        member.split("://")[1].split(":")[0] for member in env["ETCD_INITIAL_CLUSTER"].split(",")
    }
    assert set(etcd["spec"]["dnsNames"]) == {*hosts, "etcd.engine-registry.svc", "localhost"}
    assert set(etcd["spec"]["usages"]) == {"server auth", "client auth"}


@pytest.mark.parametrize(
    "monitor", of_kind("PodMonitor"), ids=lambda each: each["metadata"]["name"]
)
def test_a_pod_monitor_finds_a_port_which_prometheus_may_reach(monitor: Manifest) -> None:
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    ports = {
        port["containerPort"]
        for namespace, labels, spec in pods(COMPLETE)
        if namespace == monitor["metadata"]["namespace"] and wanted <= labels.items()
        for container in spec["containers"]
        for port in container.get("ports", [])
        if port["name"] == endpoint["port"]
    }
    assert len(ports) == 1
    assert any(
        {"port": port, "protocol": "TCP"} in rule.get("ports", [])
        for port in ports
        for policy in of_kind("NetworkPolicy")
        if policy["metadata"]["namespace"] == monitor["metadata"]["namespace"]
        for rule in policy["spec"].get("ingress", [])
        if any("'monitoring'" in str(source) for source in rule["from"])
    )


def test_jobs_have_the_names_that_the_alerts_ask_for() -> None:
    jobs = {job for each in of_kind("PodMonitor") for job in values("replacement", each)}
    assert jobs == {each["job_name"] for each in CONFIG["scrape_configs"]} | {"etcd"}

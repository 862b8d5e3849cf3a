"""The manifests against Kubernetes' own JSON schemas (kubernetes-validate has them), image and settings."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.errors import SettingsRejected
from service.server.config import GRACE_SECONDS
from service.settings import PREFIX, Settings, read_settings
from tests.support.processes import running

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ops" / "kubernetes" / "engine-health.yaml").read_text()
MANIFESTS: dict[str, dict[str, Any]] = {one["kind"]: one for one in yaml.safe_load_all(TEXT)}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LABELS = {"app.kubernetes.io/name": "engine-health"}


def in_operations(key: str) -> dict[str, Any]:
    """Return the YAML block of docs/operations.md that contains a key."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    (found,) = [one for one in map(yaml.safe_load, blocks) if key in one]
    return dict(found)


PREDICTOR = in_operations("kind")["spec"]["predictor"]


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_manifests_fit_the_schemas(version: str) -> None:
    """Every manifest fits its schema of an old and of the newest version, with no unknown field."""
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"} == set(MANIFESTS)
    for manifest in MANIFESTS.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_mean_the_same_pods() -> None:
    """What the Service, the disruption budget and the spread select are the Deployment's pods; the HPA scales it."""
    deployment = MANIFESTS["Deployment"]
    assert LABELS == deployment["spec"]["template"]["metadata"]["labels"]
    assert LABELS == deployment["spec"]["selector"]["matchLabels"]
    assert LABELS == MANIFESTS["Service"]["spec"]["selector"]
    assert LABELS == MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert LABELS == POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert ("Deployment", deployment["metadata"]["name"]) == (target["kind"], target["name"])
    assert 1 == MANIFESTS["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert MANIFESTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > 1
    assert "replicas" not in deployment["spec"]  # else every apply undoes what the HPA did


@pytest.mark.parametrize("pod", [POD, PREDICTOR])
def test_service_of_the_same_name_sets_nothing(pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes' variable for the Service is none that the service could start with, so that pods are given none."""
    name = MANIFESTS["Service"]["metadata"]["name"].upper().replace("-", "_") + "_PORT"
    monkeypatch.setenv(name, "tcp://10.96.0.17:80")
    with pytest.raises(SettingsRejected, match=f"^{name}="):
        read_settings()
    assert pod["enableServiceLinks"] is False


def test_pod_computes_on_the_cores_that_it_requests() -> None:
    """One thread of inference for each requested core: without a limit it would take one for every core of the node."""
    for container in (CONTAINER, *PREDICTOR["containers"]):
        given = {one["name"]: one["value"] for one in container["env"]}
        assert given["ENGINE_HEALTH_THREADS"] == container["resources"]["requests"]["cpu"]
        assert {name.removeprefix(PREFIX).lower() for name in given} <= set(Settings.model_fields)


def test_scrape_job_has_the_name_of_the_alerts() -> None:
    """The scrape job of docs/operations.md has the name in ops/alerts.yml, and keeps the manifests' pods and port."""
    (job,) = in_operations("scrape_configs")["scrape_configs"]
    asked = set(re.findall(r'job="([^"]+)"', (ROOT / "ops" / "alerts.yml").read_text()))
    assert asked == {job["job_name"]}
    (rule,) = job["relabel_configs"]
    ((label, value),) = LABELS.items()
    assert f"__meta_kubernetes_pod_label_{re.sub('[./]', '_', label)}" == rule["source_labels"][0]
    assert "__meta_kubernetes_pod_container_port_name" == rule["source_labels"][1]
    assert ("keep", f"{value};{CONTAINER['ports'][0]['name']}") == (rule["action"], rule["regex"])


def test_pod_is_what_the_image_expects() -> None:
    """User, port, writable folders, secrets and version are the image's; nothing may write but to /data and /tmp."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    security = POD["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in dockerfile
    assert f"EXPOSE {CONTAINER['ports'][0]['containerPort']}" in dockerfile
    assert f'version="{CONTAINER["image"].split(":")[1]}"' in dockerfile
    paths = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {"secrets": str(Settings.model_fields["secrets"].default), "tmp": "/tmp", "data": "/data"} == paths
    assert {name.removeprefix(PREFIX.lower()) for name in re.findall(r"engine_health_\w+", TEXT)} <= set(
        Settings.model_fields
    )
    assert {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}} == (
        CONTAINER["securityContext"]
    )
    assert security["runAsNonRoot"] is True
    assert POD["automountServiceAccountToken"] is False


def test_pod_has_time_to_drain() -> None:
    """Probes use the right paths, and a pod is killed only after preStop, draining and requests in flight."""
    probes = {kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"} == probes
    before = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = Settings.model_fields["drain_seconds"].default
    assert POD["terminationGracePeriodSeconds"] > before + drain + GRACE_SECONDS
    assert (
        drain < before + CONTAINER["readinessProbe"]["periodSeconds"] * CONTAINER["readinessProbe"]["failureThreshold"]
    )


def test_probes_need_no_key() -> None:
    """A service with keys returns 200 without a key for every path of a probe."""
    probes = [*(CONTAINER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))]
    probes += [one["readinessProbe"] for one in PREDICTOR["containers"]]
    with running(ENGINE_HEALTH_API_KEYS="a-key-of-this-test") as service:
        assert 401 == service.client.get("/v2/models/engine-health/ready").status_code
        assert [200] * len(probes) == [service.client.get(one["httpGet"]["path"]).status_code for one in probes]


def test_inference_service_is_the_same_container() -> None:
    """KServe's predictor in docs/operations.md is a valid pod of the same image, port, user and limits."""
    (container,) = PREDICTOR["containers"]
    assert ("serving.kserve.io/v1beta1", "InferenceService") == tuple(
        map(in_operations("kind").get, ("apiVersion", "kind"))
    )
    assert "kserve-container" == container["name"]  # KServe looks for this one
    assert (CONTAINER["image"], 8000) == (container["image"], container["ports"][0]["containerPort"])
    assert CONTAINER["resources"] == container["resources"]
    user = {key: POD["securityContext"][key] for key in ("runAsNonRoot", "runAsUser", "runAsGroup")}
    assert CONTAINER["securityContext"] | user == container["securityContext"]
    assert "securityContext" not in PREDICTOR  # Knative refuses a pod's, unless a feature flag of its allows it
    pod = {key: value for key, value in PREDICTOR.items() if key not in ("minReplicas", "maxReplicas")}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)

"""The manifests against Kubernetes' own JSON schemas (kubernetes-validate has them), image and settings."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import PREFIX, Settings
from service.workers import GRACE_SECONDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ops" / "kubernetes" / "engine-health.yaml").read_text()
MANIFESTS: dict[str, dict[str, Any]] = {one["kind"]: one for one in yaml.safe_load_all(TEXT)}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LABELS = {"app.kubernetes.io/name": "engine-health"}


def inference_service() -> dict[str, Any]:
    """The InferenceService of docs/operations.md."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), re.DOTALL)
    (found,) = [one for one in map(yaml.safe_load, blocks) if one["kind"] == "InferenceService"]
    return dict(found)


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
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["minAvailable"] < deployment["spec"]["replicas"]


def test_the_pod_is_what_the_image_expects() -> None:
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


def test_a_pod_has_time_to_drain() -> None:
    """Probes ask the right paths, and a pod is killed only after preStop, draining and what is in flight."""
    probes = {kind: CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"} == probes
    before = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = Settings.model_fields["drain_seconds"].default
    assert POD["terminationGracePeriodSeconds"] > before + drain + GRACE_SECONDS
    assert (
        drain < before + CONTAINER["readinessProbe"]["periodSeconds"] * CONTAINER["readinessProbe"]["failureThreshold"]
    )


def test_the_inference_service_is_the_same_container() -> None:
    """KServe's predictor in docs/operations.md is a valid pod of the same image, port and limits."""
    predictor = inference_service()["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert "serving.kserve.io/v1beta1" == inference_service()["apiVersion"]
    assert "kserve-container" == container["name"]  # KServe looks for this one
    assert (CONTAINER["image"], 8000) == (container["image"], container["ports"][0]["containerPort"])
    assert CONTAINER["securityContext"] == container["securityContext"]
    pod = {key: value for key, value in predictor.items() if key not in ("minReplicas", "maxReplicas")}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)

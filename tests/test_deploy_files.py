"""The files that bring up clusters: Ray accepts them, and they say what the documentation says of them."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
CLUSTERS = ("cluster.yaml", "deploy/local.yaml", "deploy/fake_multinode.yaml")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / name).read_text())
    return loaded


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_knows_every_key(name: str) -> None:
    # Found, not imported: a service that another test starts in this process has to be there before Ray is.
    (package,) = find_spec("ray").submodule_search_locations  # type: ignore[union-attr,misc]
    schema = json.loads((Path(package) / "autoscaler" / "ray-schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(load(name))] == []
    assert list(validator.iter_errors({**load(name), "min_worker": 1})), "the schema refuses what it does not know"


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/local.yaml"])
def test_the_head_deploys_once_every_node_is_there(name: str) -> None:
    config = load(name)
    provider = config["provider"]
    workers = len(provider["worker_ips"]) if provider["type"] == "local" else config["max_workers"]
    *_, start, deploy = config["head_start_ray_commands"]
    assert "ray start --head" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert re.fullmatch(rf"profile-service deploy --address auto --nodes {1 + workers} .*", deploy)
    assert deploy.split("--schema ")[1] in config["file_mounts"]
    for local in config["file_mounts"].values():
        assert local == "./dist" or (REPOSITORY / local).exists()


def test_workers_of_the_cloud_are_never_taken_for_idle() -> None:
    config = load("cluster.yaml")
    worker = config["available_node_types"]["worker"]
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_the_versions_are_the_ones_that_are_pinned() -> None:
    ray = version("ray")
    cluster = next(d for d in kuberay() if d["kind"] == "RayCluster")
    assert cluster["spec"]["rayVersion"] == ray
    assert f"FROM rayproject/ray:{ray}-" in (REPOSITORY / "deploy" / "Dockerfile").read_text()


def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((REPOSITORY / "deploy" / "kuberay.yaml").read_text()))


def test_on_kubernetes_every_node_has_a_claim_of_its_own_and_the_job_waits_for_all_of_them() -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for document in kuberay():
        by_kind.setdefault(document["kind"], []).append(document)
    (cluster,), (job,), (service,) = by_kind["RayCluster"], by_kind["RayJob"], by_kind["Service"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    mounted = []
    for group in groups:
        assert group.get("replicas", 1) == group.get("maxReplicas", 1) == 1
        pod = group["template"]["spec"]
        (volume,) = pod["volumes"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/data"}]
        mounted.append(volume["persistentVolumeClaim"]["claimName"])
    assert sorted(mounted) == sorted({claim["metadata"]["name"] for claim in by_kind["PersistentVolumeClaim"]})
    assert f"--nodes {len(groups)} --data-dir /data/" in job["spec"]["entrypoint"]
    assert job["spec"]["clusterSelector"] == service["spec"]["selector"]
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]

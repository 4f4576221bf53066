"""The files that start clusters: Ray's validator takes them, KubeRay's schema does, and they keep ports closed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from slidr.cli import override
from slidr.config import load

ROOT = Path(__file__).parents[2]
CLUSTERS = [ROOT / "cluster.yaml", *sorted((ROOT / "deploy").glob("cluster-*.yaml"))]
RAYJOBS = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
MANIFEST_NAMES = {"superpixels", "pretrain", "tune"}

# What the manifests use of KubeRay's RayJob, ray.io/v1, with the types published in
# github.com/ray-project/kuberay: ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go (authOptions: since
# version 1.5.1), ray-operator/config/crd/bases/ray.io_rayjobs.yaml for the pods inside. A trailing "!" is a required
# field, a string a pattern, a list of one type an array, {"*": type} a mapping with any keys.
QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)
RESOURCES = {"requests": {"*": QUANTITY}, "limits": {"*": QUANTITY}}
SECURITY = {
    "runAsNonRoot": bool,
    "runAsUser": int,
    "allowPrivilegeEscalation": bool,
    "capabilities": {"drop": [str]},
    "seccompProfile": {"type!": "^(RuntimeDefault|Localhost|Unconfined)$"},
}
POD_TEMPLATE = {
    "spec": {
        "containers!": [
            {
                "name!": str,
                "image": str,
                "resources": RESOURCES,
                "securityContext": SECURITY,
                "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
            }
        ],
        "securityContext": {
            "fsGroup": int,
            "runAsNonRoot": bool,
            "runAsUser": int,
            "seccompProfile": {"type!": "^(RuntimeDefault|Localhost|Unconfined)$"},
        },
        "automountServiceAccountToken": bool,
        "restartPolicy": "^(Always|OnFailure|Never)$",
        "tolerations": [{"key": str, "operator": "^(Exists|Equal)$", "effect": "^(NoSchedule|NoExecute)$"}],
        "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str, "readOnly": bool}}],
    }
}
RAYJOB = {
    "apiVersion!": "^ray.io/v1$",
    "kind!": "^RayJob$",
    "metadata!": {"name!": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    "spec!": {
        "entrypoint": str,
        "submissionMode": "^(K8sJobMode|HTTPMode|InteractiveMode|SidecarMode)$",
        "submitterPodTemplate": POD_TEMPLATE,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": "^(disabled|token)$", "secretName": str},
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {
                "idleTimeoutSeconds": int,
                "upscalingMode": "^(Default|Aggressive|Conservative)$",
                "securityContext": SECURITY,
            },
            "headGroupSpec!": {"rayStartParams": {"*": str}, "template!": POD_TEMPLATE},
            "workerGroupSpecs": [
                {
                    "groupName!": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": {"*": str},
                    "template!": POD_TEMPLATE,
                }
            ],
        },
    },
}


def violations(value: Any, kind: Any, path: str = "") -> list[str]:
    """Where a value departs from a kind written as above."""
    if isinstance(kind, dict) and "*" in kind:
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping, got {value!r}"]
        return [line for key in value for line in violations(value[key], kind["*"], f"{path}.{key}")]
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping, got {value!r}"]
        known = {name.rstrip("!"): inner for name, inner in kind.items()}
        found = [f"{path}.{name}: unknown field" for name in value if name not in known]
        found += [f"{path}.{name[:-1]}: missing" for name in kind if name.endswith("!") and name[:-1] not in value]
        return found + [
            line for name in value if name in known for line in violations(value[name], known[name], f"{path}.{name}")
        ]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{path}: expected a list, got {value!r}"]
        return [line for i, item in enumerate(value) for line in violations(item, kind[0], f"{path}[{i}]")]
    if isinstance(kind, str):
        return [] if isinstance(value, str) and re.search(kind, value) else [f"{path}: {value!r} is not {kind}"]
    return [] if type(value) is kind else [f"{path}: expected {kind.__name__}, got {value!r}"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_rays_validator_accepts_every_cluster_file(path: Path) -> None:
    validate_config(prepare_config(read(path)))
    broken = {**read(path), "max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):  # or the validator looks at nothing
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_a_cluster_wants_its_token_and_shows_the_dashboard_to_loopback_only(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith("RAY_AUTH_MODE=token ray start ")
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_field_of_a_cluster_file_has_a_comment_where_it_first_appears(path: Path) -> None:
    lines = ["", *path.read_text().splitlines(), ""]
    explained: set[str] = set()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        field = re.match(r" {0,6}([A-Za-z_]+):( |$)", line)
        if field is None:
            continue
        if any(text.strip().startswith("#") for text in (before, after)):
            explained.add(field[1])
        assert field[1] in explained, f"{path.name}: {line}"


def test_there_is_a_cpu_head_spot_cpus_for_superpixels_and_gpus_for_training() -> None:
    config = read(ROOT / "cluster.yaml")
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert kinds["superpixels"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "GPU" not in kinds["superpixels"]["resources"]
    assert kinds["training"]["resources"]["GPU"] == 1
    assert [kinds[name]["min_workers"] for name in ("superpixels", "training")] == [0, 0]


def test_every_machine_on_aws_has_a_profile_to_pull_the_image_with_which_the_page_makes() -> None:
    kinds = read(ROOT / "cluster.yaml")["available_node_types"]
    profiles = {kind: values["node_config"]["IamInstanceProfile"]["Arn"] for kind, values in kinds.items()}
    names = {kind: arn.rpartition("instance-profile/")[2] for kind, arn in profiles.items()}
    assert names == {"head": "slidr-head", "superpixels": "slidr-worker", "training": "slidr-worker"}
    made = re.findall(r"for name in ([\w -]+); do", (ROOT / "docs" / "cluster.md").read_text())
    assert [text.split() for text in made] == [sorted(set(names.values()))]


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.name)
def test_a_rayjob_has_only_fields_of_kuberays_schema_and_their_types(path: Path) -> None:
    manifest = read(path)
    assert violations(manifest, RAYJOB) == []
    manifest["spec"]["ttlSecondsAfterFinished"] = "60"
    del manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    manifest["spec"]["shutdown"] = True
    assert len(violations(manifest, RAYJOB)) == 3


def test_there_is_a_rayjob_for_superpixels_pretraining_and_tuning() -> None:
    assert {path.stem for path in RAYJOBS} == MANIFEST_NAMES


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.name)
def test_a_rayjob_runs_a_job_of_this_tree_with_options_that_its_config_takes(path: Path) -> None:
    python, job, config, *options = shlex.split(read(path)["spec"]["entrypoint"])
    inside = "/opt/slidr/"
    assert python == "python"
    assert (ROOT / job.removeprefix(inside)).exists()
    assert f"COPY {job.removeprefix(inside).split('/')[0]} " in (ROOT / "Dockerfile").read_text()
    changed = override(load(ROOT / config.removeprefix(inside)), options)  # refuses what the schema does not know
    for value in (changed.data.root, changed.data.frames, changed.superpixels.folder):
        assert value.startswith("/mnt/slidr/")


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.name)
def test_a_rayjobs_pods_want_the_token_and_have_rays_locked_version(path: Path) -> None:
    cluster = read(path)["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/mnt/slidr"]


def pods(manifest: Any) -> dict[str, Any]:
    """The pods that a RayJob makes, by what they do: their specs."""
    cluster = manifest["spec"]["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    head = cluster["headGroupSpec"]["template"]["spec"]
    return {"submitter": manifest["spec"]["submitterPodTemplate"]["spec"], "head": head, **workers}


def unrestricted(pod: Any) -> list[str]:
    """Where a pod departs from Kubernetes' restricted Pod Security Standard, and what of it could become root.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    found = []
    for container in pod["containers"]:
        has = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        wanted = {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        found += [f"{container['name']}: {key} is {has.get(key)}" for key in wanted if has.get(key) != wanted[key]]
    return found


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.name)
def test_every_pod_of_a_rayjob_keeps_to_kubernetes_restricted_standard(path: Path) -> None:
    manifest = read(path)
    assert {name: unrestricted(pod) for name, pod in pods(manifest).items()} == {name: [] for name in pods(manifest)}
    cluster = manifest["spec"]["rayClusterSpec"]
    if cluster.get("enableInTreeAutoscaling"):  # a container that KubeRay puts beside the head's
        options, head = cluster["autoscalerOptions"], pods(manifest)["head"]
        beside = {"name": "autoscaler", "securityContext": options["securityContext"]}
        assert unrestricted({**head, "containers": [beside]}) == []
    pods(manifest)["head"]["containers"][0]["securityContext"]["capabilities"]["drop"] = ["NET_RAW"]
    assert len(unrestricted(pods(manifest)["head"])) == 1


def test_the_image_has_the_user_that_the_pods_run_as() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "useradd --create-home --uid 1000 ray" in dockerfile
    assert "\nUSER ray\n" in dockerfile


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda path: path.name)
def test_only_a_head_with_an_autoscaler_beside_it_has_a_token_for_kubernetes(path: Path) -> None:
    manifest = read(path)
    autoscaled = manifest["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    tokens = {name: pod["automountServiceAccountToken"] for name, pod in pods(manifest).items()}
    assert {name for name, token in tokens.items() if token} == ({"head"} if autoscaled else set())


def images(value: Any) -> set[str]:
    """Every image that a manifest or cluster file names."""
    if isinstance(value, dict):
        own = {value["image"]} if isinstance(value.get("image"), str) else set()
        return own.union(*map(images, value.values()))
    return set().union(*map(images, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("path", [*CLUSTERS, *RAYJOBS], ids=lambda path: path.name)
def test_a_file_names_one_image_of_this_version_and_says_how_to_pin_it(path: Path) -> None:
    (image,) = images(read(path))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    name, _, tag = image.rpartition(":")
    assert tag == version[1], "neither a floating tag nor another version's"
    assert re.search(
        rf"^ *#.*{re.escape(name.rpartition('/')[2])}:{re.escape(tag)}@sha256:DIGEST", path.read_text(), re.M
    )
    assert f"docker build -t slidr:{tag} ." in (ROOT / "docs" / "cluster.md").read_text()


def test_pillow_is_no_older_than_the_first_without_known_holes_and_locked_so() -> None:
    """Every image that is read passes through it. 12.3.0 is the last with a published hole."""
    wanted = re.search(r'"pillow>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    locked = re.search(r"^pillow==([\d.]+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert wanted is not None
    assert locked is not None
    least, version = (tuple(map(int, found[1].split("."))) for found in (wanted, locked))
    assert (12, 3, 0) < least <= version


def test_pretraining_on_kubernetes_has_the_room_that_it_asks_for() -> None:
    from slidr.cluster.room import shortage
    from slidr.cluster.session import Node

    manifest = read(ROOT / "deploy" / "kuberay" / "pretrain.yaml")
    _, _, config, *options = shlex.split(manifest["spec"]["entrypoint"])
    changed = override(load(ROOT / config.removeprefix("/opt/slidr/")), options)
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    node = Node(int(limits["cpu"]), int(limits["nvidia.com/gpu"]))
    assert shortage(changed.cluster, [Node(0)] + [node] * group["replicas"]) is None
    assert shortage(changed.cluster, [Node(0)] + [node] * (group["replicas"] - 1)) is not None

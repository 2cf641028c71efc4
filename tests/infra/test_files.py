"""What infra/ holds, checked without a cloud: schemas, linters, and that the files agree with each other."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from botocore.validate import validate_parameters
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.conftest import ROOT

INFRA = ROOT / "infra"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BIN = Path(sys.executable).parent
WORKER_GROUPS = ("gpu", "cpu")


def lint(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


# -- the container file ------------------------------------------------------------------------------------------------
def instructions() -> list[tuple[str, str]]:
    """The container file's instructions, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_container_file_passes_its_linter() -> None:
    lint(BIN / "hadolint", INFRA / "Containerfile")


def test_the_image_gets_every_file_that_the_wheel_is_made_of() -> None:
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"], *packages["packages"]}
    for package in packages["packages"]:  # and the folders that its links lead to
        needed |= {path.resolve().name for path in (ROOT / package).iterdir() if path.is_symlink()}
    assert copied == needed
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_installs_what_the_project_asks_for(tmp_path: Path) -> None:
    """Its own commands, run here: torch as pinned, then all dependencies, a cluster's and the scorers'."""
    run = next(rest for kind, rest in instructions() if kind == "RUN" and "requirements.txt" in rest)
    script = run.replace(" /torch.txt", f" {tmp_path}/torch.txt").replace(" /requirements.txt", f" {tmp_path}/all.txt")
    path = f"{BIN}:/usr/bin:/bin"
    subprocess.run(["sh", "-ec", script], cwd=ROOT, env={"PATH": path}, check=True)
    assert (tmp_path / "torch.txt").read_text().split() == [f"torch=={pinned('torch')}"]
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["cluster"], *extras["scorers"]]
    assert (tmp_path / "all.txt").read_text().splitlines() == wanted


def test_the_image_runs_as_a_user_who_is_not_root() -> None:
    kinds = dict(instructions())
    assert kinds["USER"] == "1000"
    assert "--uid 1000" in (INFRA / "Containerfile").read_text()
    assert "HOME=/home/microdit" in kinds["ENV"]  # Ray's autoscaler looks for it there
    low, high = (re.search(r"3\.\d+", bound)[0] for bound in PROJECT["requires-python"].split(","))  # type: ignore[index]
    python = re.search(r"python:(3\.\d+)-slim", kinds["FROM"])[1]  # type: ignore[index]
    assert tuple(map(int, low.split("."))) <= tuple(map(int, python.split("."))) < tuple(map(int, high.split(".")))


# -- AWS ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def aws() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "aws.yaml").read_text())


def test_the_ray_cluster_fits_rays_schema(aws: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(aws)
    validate_config(prepare_config(aws))  # and what Ray itself looks at, its defaults filled in


def test_ec2_knows_every_field_of_the_machines(aws: dict[str, Any]) -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in aws["available_node_types"].values():
        validate_parameters({**node["node_config"], "MinCount": 1, "MaxCount": 1}, model)
        known = botocore.session.get_session().get_service_model("ec2").shape_for("InstanceType").enum
        assert node["node_config"]["InstanceType"] in known


def test_the_aws_head_is_kept_and_the_workers_are_spot(aws: dict[str, Any]) -> None:
    nodes = aws["available_node_types"]
    assert aws["head_node_type"] == "head"
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    for group in WORKER_GROUPS:
        assert nodes[group]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert nodes[group]["node_config"]["IamInstanceProfile"] != nodes["head"]["node_config"]["IamInstanceProfile"]
    assert aws["max_workers"] == sum(nodes[group]["max_workers"] for group in WORKER_GROUPS)
    assert nodes["gpu"]["resources"]["GPU"] == 1 and "GPU" not in nodes["cpu"]["resources"]


def test_the_token_that_aws_gets_is_the_one_that_ray_looks_for(aws: dict[str, Any]) -> None:
    (path,) = aws["file_mounts"]
    options = aws["docker"]["run_options"]
    assert {"--env RAY_AUTH_MODE=token", f"--env RAY_AUTH_TOKEN_PATH={path}"} <= set(options)


def test_the_aws_machines_have_an_image_and_the_region(aws: dict[str, Any]) -> None:
    """Ray's own choice of an image is too old for these GPUs; AWS_REGION is asked by what reads the bucket."""
    assert all(node["node_config"]["ImageId"] for node in aws["available_node_types"].values())
    assert f"--env AWS_REGION={aws['provider']['region']}" in aws["docker"]["run_options"]


# -- Kubernetes --------------------------------------------------------------------------------------------------------
@pytest.fixture
def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes.yaml").read_text()))


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def test_kubernetes_knows_every_field_of_the_pods(kubernetes: list[dict[str, Any]]) -> None:
    """Its published schemas, strict. They do not know KubeRay's RayJob: see the next test."""
    account, job = kubernetes
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(account, version, strict=True)
    for name, group in groups(job).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):  # it does look at them
            kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "tolerated": []}}, version, strict=True)


def test_the_ray_job_has_the_fields_of_kuberay(kubernetes: list[dict[str, Any]]) -> None:
    """Names and types as in the custom resource definition ray.io_rayjobs.yaml (ray.io/v1) of KubeRay 1.7.

    The whole file was valid against that definition, made strict, when it was written.
    """
    _, job = kubernetes
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    known = {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": dict,
    }
    assert {name: type(value) for name, value in job["spec"].items()} == known
    cluster = job["spec"]["rayClusterSpec"]
    known = {
        "rayVersion": str,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    }
    assert {name: type(value) for name, value in cluster.items()} == known
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"] == {"version": "v2", "idleTimeoutSeconds": 300}
    for name, group in groups(job).items():
        counts = {"groupName", "replicas", "minReplicas", "maxReplicas"} if name != "head" else set()
        assert group.keys() == counts | {"rayStartParams", "template"}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert name == "head" or group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kubernetes_head_is_kept_and_the_workers_are_spot(kubernetes: list[dict[str, Any]]) -> None:
    account, job = kubernetes
    found = groups(job)
    assert found.keys() == {"head", *WORKER_GROUPS}
    assert found["head"]["rayStartParams"]["num-cpus"] == "0"
    pods = {name: group["template"]["spec"] for name, group in found.items()}
    for name, pod in pods.items():
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert list(pod["nodeSelector"].values()) == ["ON_DEMAND" if name == "head" else "SPOT"]
        assert any("spot" in taint["key"] for taint in pod.get("tolerations", [])) == (name != "head")
        (container,) = pod["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("1" if name == "gpu" else None)
    assert len({pod["containers"][0]["image"] for pod in pods.values()}) == 1


def test_kubernetes_reads_files_in_a_volume_and_tries_no_wrong_request_again(kubernetes: list[dict[str, Any]]) -> None:
    job = kubernetes[1]
    assert job["spec"]["backoffLimit"] == 0 and "resources.scratch=/scratch" in job["spec"]["entrypoint"]
    for name, group in groups(job).items():
        (container,) = group["template"]["spec"]["containers"]
        assert container["imagePullPolicy"] == "Always"
        assert {"name": "scratch", "mountPath": "/scratch"} in container["volumeMounts"]
        assert any("emptyDir" in volume for volume in group["template"]["spec"]["volumes"])
        assert group["template"]["spec"]["securityContext"]["fsGroup"] == 1000  # of the image's user
        assert name == "head" or container["resources"]["requests"]["ephemeral-storage"]


# -- what all of them share --------------------------------------------------------------------------------------------
def test_one_image_serves_all(aws: dict[str, Any], kubernetes: list[dict[str, Any]]) -> None:
    image = f"REGISTRY/microdit:{PROJECT['version']}"
    assert aws["docker"]["image"] == image
    assert groups(kubernetes[1])["head"]["template"]["spec"]["containers"][0]["image"] == image
    for file in ("Containerfile", "README.md"):
        assert image in (INFRA / file).read_text()


@pytest.mark.parametrize("script", sorted((INFRA / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_the_slurm_scripts_pass_shellcheck(script: Path) -> None:
    lint(BIN / "shellcheck", script)

"""cluster.yaml, jobs/rayjob.yaml and the image: checked as Ray, AWS and Kubernetes would, without any of them running.

References: Ray's JSON schema, its autoscaler's validation, AWS provider and scheduler; AWS's description of RunInstances in
botocore; moto's EC2 with AWS's list of machines; the Kubernetes schemas; the fields of KubeRay's API.
"""

import copy
import re
import shlex
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from undo_ray import config, plan

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
JOB = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())
TYPES = CLUSTER["available_node_types"]
GPU_TYPES = [name for name, each in TYPES.items() if "GPU" in each["resources"]]
KIND = {"p5.48xlarge": "H100", "g6e.48xlarge": "L40S"}
"""GPUs of a machine, as undo_ray.plan calls them."""
REAL = ("math", "mmlu_pro", "numina-paper", "gsm8k", "svamp")

Json = dict[str, Any]


def recipe(name: str, *sets: str) -> config.Recipe:
    return config.load(ROOT / "jobs" / "recipes" / f"{name}.toml", sets)


def changed(tree: Json, path: str, value: Any) -> Json:
    """A copy with another value at `a/b/0/c`; None removes it."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split("/")
    at: Any = tree
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return tree


# -- cluster.yaml -------------------------------------------------------------------------------------------------------


def prepared(cluster: Json) -> Json:
    """What `ray up` makes of a cluster.yaml before it calls the cloud. Raises when it is none, by Ray's schema or its rules."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found: Json = prepare_config(copy.deepcopy(cluster))
    validate_config(found)
    return found


def refused_by_ec2(node_config: Json) -> str:
    """What is wrong with a node as AWS's RunInstances takes it; empty when nothing is."""
    import botocore.session
    from botocore.validate import ParamValidator

    taken = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    if node_config["InstanceType"] not in taken.members["InstanceType"].enum:
        return f"no instance type {node_config['InstanceType']}"
    return str(ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, taken).generate_report())


def test_ray_takes_the_cluster_file() -> None:
    found = prepared(CLUSTER)
    assert found["head_node_type"] == "head"
    assert found["setup_commands"] == [] and found["head_setup_commands"] == [], "Ray's own would install a nightly build"
    assert found["provider"]["cache_stopped_nodes"] is False, "a stopped node's disk costs"


@pytest.mark.parametrize(
    "path, value",
    [
        ("available_node_types/cpu/max_worker", 4),
        ("available_node_types/cpu/resources/CPU", 0.5),
        ("available_node_types/cpu/resources", None),
        ("idle_timeout_seconds", 5),
        ("docker/container_name", None),
        ("head_node_type", "none"),
        ("available_node_types/cpu/min_workers", 9),  # above max_workers
    ],
)
def test_ray_refuses_a_cluster_file_with_a_mistake(path: str, value: Any) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        prepared(changed(CLUSTER, path, value))


@pytest.mark.parametrize("name", TYPES)
def test_ec2_takes_every_node_type(name: str) -> None:
    assert refused_by_ec2(TYPES[name]["node_config"]) == ""


@pytest.mark.parametrize(
    "path, value, wrong",
    [
        ("InstanceType", "p5.47xlarge", "no instance type"),
        ("IamInstanceProfil", {}, "Unknown parameter"),
        ("BlockDeviceMappings/0/Ebs/VolumeSize", "500", "Invalid type"),
    ],
)
def test_ec2_refuses_a_node_with_a_mistake(path: str, value: Any, wrong: str) -> None:
    assert wrong in refused_by_ec2(changed(TYPES["teacher"]["node_config"], path, value))


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An EC2 of moto's with what docs/cluster.md makes once, but for the security group; keys go to a home of their own."""
    import boto3
    from moto import mock_aws

    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        iam = boto3.client("iam")
        for name in ("undo-ray-head", "undo-ray-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield boto3.client("ec2", region_name=CLUSTER["provider"]["region"])


def may_come_in(ec2: Any) -> set[str]:
    """Addresses that the group `undo-ray` lets in."""
    [group] = ec2.describe_security_groups(GroupNames=["undo-ray"])["SecurityGroups"]
    return {address["CidrIp"] for rule in group["IpPermissions"] for address in rule["IpRanges"]}


def test_ray_starts_each_type_on_ec2_behind_the_group_that_is_there(ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    [vpc] = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    group = ec2.create_security_group(GroupName="undo-ray", Description="undo-ray", VpcId=vpc["VpcId"])["GroupId"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, among])

    ready = bootstrap_aws(prepared(CLUSTER))
    assert may_come_in(ec2) == {"203.0.113.7/32"}
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for name, each in ready["available_node_types"].items():
        provider.create_node({**each["node_config"], "ImageId": image}, {"ray-user-node-type": name}, 1)
    nodes = [node for each in ec2.describe_instances()["Reservations"] for node in each["Instances"]]
    assert [
        (
            node["InstanceType"],
            node.get("InstanceLifecycle", "on demand"),
            node["IamInstanceProfile"]["Arn"].rpartition("/")[2],
            [each["GroupName"] for each in node["SecurityGroups"]],
        )
        for node in nodes
    ] == [
        ("m7i.4xlarge", "on demand", "undo-ray-head", ["undo-ray"]),
        ("m7i.4xlarge", "on demand", "undo-ray-worker", ["undo-ray"]),
        ("p5.48xlarge", "spot", "undo-ray-worker", ["undo-ray"]),
        ("p5.48xlarge", "on demand", "undo-ray-worker", ["undo-ray"]),
        ("g6e.48xlarge", "on demand", "undo-ray-worker", ["undo-ray"]),
    ]


def test_a_group_that_ray_makes_lets_everybody_in(ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws

    bootstrap_aws(prepared(CLUSTER))
    assert may_come_in(ec2) == {"0.0.0.0/0"}


def test_the_machines_have_what_their_types_say(ec2: Any) -> None:
    asked = {each["node_config"]["InstanceType"] for each in TYPES.values()}
    machines = {each["InstanceType"]: each for each in ec2.describe_instance_types(InstanceTypes=list(asked))["InstanceTypes"]}
    for each in TYPES.values():
        machine = machines[each["node_config"]["InstanceType"]]
        gpus = machine.get("GpuInfo", {}).get("Gpus", [])
        assert each["resources"]["CPU"] <= machine["VCpuInfo"]["DefaultVCpus"]
        assert each["resources"].get("GPU", 0) == sum(gpu["Count"] for gpu in gpus)
        for gpu in gpus:
            assert gpu["Name"] == KIND[machine["InstanceType"]]


def test_nothing_listens_beyond_the_cluster_and_every_node_has_the_token() -> None:
    assert all("--dashboard-host=127.0.0.1" in line for line in CLUSTER["head_start_ray_commands"] if "--head" in line)
    assert set(CLUSTER["provider"]["security_group"]) == {"GroupName"}, "no port is opened here"
    assert CLUSTER["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}  # where Ray looks when nothing else is set
    assert "-e RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert JOB["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"


# -- jobs/rayjob.yaml ---------------------------------------------------------------------------------------------------

TEXT: Json = {"type": "string"}
WHOLE: Json = {"type": "integer"}
FLAG: Json = {"type": "boolean"}
TEXTS: Json = {"type": "object", "additionalProperties": TEXT}
LIST: Json = {"type": "array"}
THING: Json = {"type": "object"}


def one_of(*values: str) -> Json:
    return {"enum": list(values)}


def only(needed: str = "", **fields: Json) -> Json:
    return {"type": "object", "additionalProperties": False, "required": needed.split(), "properties": fields}


GROUP = {"rayStartParams": TEXTS, "template": only("spec", metadata=THING, spec=THING), "resources": TEXTS, "labels": TEXTS}
RAY_JOB = only(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=THING,
    spec=only(
        activeDeadlineSeconds=WHOLE, backoffLimit=WHOLE, submitterPodTemplate=THING, metadata=TEXTS, clusterSelector=TEXTS,
        submitterConfig=only(backoffLimit=WHOLE), managedBy=TEXT, deletionStrategy=THING, entrypoint=TEXT, runtimeEnvYAML=TEXT,
        jobId=TEXT, submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), entrypointResources=TEXT,
        entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, ttlSecondsAfterFinished=WHOLE,
        preRunningDeadlineSeconds=WHOLE, shutdownAfterJobFinishes=FLAG, suspend=FLAG,
        rayClusterSpec=only(
            "headGroupSpec",
            upgradeStrategy=THING, authOptions=only(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
            suspend=FLAG, managedBy=TEXT, headServiceAnnotations=TEXTS, enableInTreeAutoscaling=FLAG, rayVersion=TEXT,
            gcsFaultToleranceOptions=THING, networkPolicy=THING, tlsOptions=only(enabled=FLAG), historyServerOptions=THING,
            autoscalerOptions=only(
                resources=THING, image=TEXT, imagePullPolicy=TEXT, securityContext=THING, idleTimeoutSeconds=WHOLE,
                upscalingMode=one_of("Default", "Aggressive", "Conservative"), version=one_of("v1", "v2"), env=LIST,
                envFrom=LIST, volumeMounts=LIST, command=LIST, args=LIST,
            ),
            headGroupSpec=only(
                "template", **GROUP, headService=THING, enableIngress=FLAG, ingressOptions=THING,
                serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
            ),
            workerGroupSpecs={"type": "array", "items": only(
                "groupName minReplicas maxReplicas rayStartParams template", **GROUP, suspend=FLAG, groupName=TEXT,
                replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, idleTimeoutSeconds=WHOLE, priority=WHOLE,
                scaleStrategy=THING, numOfHosts=WHOLE,
            )},
        ),
    ),
)  # fmt: skip
"""The fields of a RayJob: names, kinds and choices of KubeRay 1.7.0's API reference (docs/reference/api.md there)."""


def groups(job: Json) -> list[Json]:
    spec = job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def derived(job: Json) -> Json:
    """What Ray's autoscaler makes of the manifest. Raises when it is none, by KubeRay's fields or by Kubernetes' of a pod."""
    import kubernetes_validate
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    jsonschema.validate(job, RAY_JOB)
    for group in groups(job):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
    resource = {"metadata": {"name": "a", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    found: Json = _derive_autoscaling_config_from_ray_cr(resource)
    return found


def test_kuberay_kubernetes_and_ray_take_the_manifest() -> None:
    found = derived(JOB)
    assert set(found["available_node_types"]) == {"headgroup", "cpu", "teacher-spot", "teacher", "training"}


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec/entryPoint", "python a.py"),
        ("spec/submissionMode", "K8sJob"),
        ("spec/rayClusterSpec/authOptions/mode", "on"),
        ("spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),  # a text to KubeRay
        ("spec/rayClusterSpec/workerGroupSpecs/0/maxReplica", 4),
        ("spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", None),
        ("spec/rayClusterSpec/workerGroupSpecs/1/template/spec/toleration", []),
        ("spec/rayClusterSpec/workerGroupSpecs/1/template/spec/tolerations/0/operator", 1),
        ("spec/rayClusterSpec/workerGroupSpecs/1/template/spec/containers/0/volumeMounts/0/path", "/cache"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(path: str, value: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        derived(changed(JOB, path, value))


def test_the_job_runs_a_recipe_that_exists_in_a_place_that_lasts() -> None:
    python, script, path, *flags = shlex.split(JOB["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script).is_file()
    assert config.load(ROOT / path)
    assert flags[0] == "--run-dir" and flags[1].startswith("s3://")
    assert yaml.safe_load(JOB["spec"]["runtimeEnvYAML"])["working_dir"].startswith("s3://"), "the code comes with the job"


# -- both: what starts for what a recipe asks ---------------------------------------------------------------------------

ClusterConfig = Callable[[], Json]


@cache
def of_aws() -> Json:
    return prepared(CLUSTER)


@cache
def of_kuberay() -> Json:
    """The same, with its groups under the names of cluster.yaml."""
    found = derived(JOB)
    names = {"headgroup": "head", "teacher-spot": "teacher_spot"}
    nodes = {names.get(name, name): each for name, each in found["available_node_types"].items()}
    return {**found, "available_node_types": nodes, "head_node_type": "head"}


BOTH = pytest.mark.parametrize("cluster", [of_aws, of_kuberay])


def started(
    found: Json, actors: list[Json], workers: list[Json], failed: tuple[tuple[str, str], ...] = ()
) -> tuple[dict[str, int], int]:
    """(nodes by type that Ray's autoscaler would start for these actors and this group of workers, how many have no place).

    `failed`: types whose last node did not come, and the state it ended in.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    monitor.notify(
        [InstanceUpdateEvent(instance_type=name, new_instance_status=getattr(Instance, state)) for name, state in failed]
    )
    known, make = AutoscalingConfig(found, skip_content_hash=True), ResourceRequestUtil.make  # else it reads the token
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=known.get_node_type_configs(),
        max_num_nodes=known.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([make(each) for each in actors]),
        gang_resource_requests=[GangResourceRequest(requests=[make(each) for each in workers])] if workers else [],
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
    )
    reply = ResourceDemandScheduler().schedule(request)
    homeless = len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)
    return {each.instance_type: each.count for each in reply.to_launch}, homeless


def asks(one: config.Placement, count: int) -> list[Json]:
    return [{"CPU": one.cpus, "GPU": one.gpus}] * count


@BOTH
@pytest.mark.parametrize("name", REAL)
def test_one_spot_node_holds_each_stage_of_a_recipe(cluster: ClusterConfig, name: str) -> None:
    one, found = recipe(name), cluster()
    teacher, student = one.teacher.engine, one.student
    spot = ({"cpu": 1, "teacher_spot": 1}, 0)
    assert started(found, asks(teacher.resources, teacher.replicas), []) == spot
    assert started(found, asks(student.engine.resources, student.engine.replicas), []) == spot
    assert started(found, [], asks(student.resources, student.workers)) == spot


@BOTH
def test_what_starts_next_when_spot_is_gone_or_taken(cluster: ClusterConfig) -> None:
    """A pod that does not come up is as a machine that does not; a machine that AWS refuses is asked for again, as the guide
    says, until it is switched off."""
    one, found = recipe("math"), copy.deepcopy(cluster())
    teacher = asks(one.teacher.engine.resources, one.teacher.engine.replicas)
    training = asks(one.student.resources, one.student.workers)
    on_demand = ({"cpu": 1, "teacher": 1}, 0)
    assert started(found, teacher, [], (("teacher_spot", "ALLOCATION_TIMEOUT"),)) == on_demand
    assert started(found, teacher, [], (("teacher_spot", "ALLOCATION_FAILED"),)) == ({"cpu": 1, "teacher_spot": 1}, 0)
    without = copy.deepcopy(found)
    without["available_node_types"]["teacher_spot"]["max_workers"] = 0
    assert started(without, teacher, []) == on_demand
    assert started(found, teacher, training) == ({"cpu": 1, "teacher_spot": 1, "teacher": 1}, 0)  # lifetime = "run"
    found["available_node_types"]["teacher"]["max_workers"] = 0
    assert started(found, teacher, training) == ({"cpu": 1, "teacher_spot": 1, "training": 1}, 0)


@BOTH
def test_cpu_work_starts_cpu_nodes_and_what_fits_nowhere_starts_none(cluster: ClusterConfig) -> None:
    found = cluster()
    assert started(found, [{"CPU": 1}] * 40, []) == ({"cpu": 3}, 0)
    assert started(found, [{"CPU": 1, "GPU": 16}], []) == ({"cpu": 1}, 1)


@BOTH
def test_only_gpu_work_makes_ray_data_ask_for_nodes(cluster: ClusterConfig) -> None:
    """More CPU tasks than the type `cpu` has room for would start GPU nodes. Ray reads the variables that prevent it."""
    import ray

    assert started(cluster(), [{"CPU": 1}] * 100, [])[0].keys() & GPU_TYPES
    source = Path(ray.__file__).parent / "data" / "_internal" / "cluster_autoscaler" / "rate_based_cluster_autoscaler.py"
    read = set(re.findall(r'"(RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_\w+_UTIL_THRESHOLD)"', source.read_text()))
    wanted = {f"{name}=2" for name in read if "_GPU_" not in name}
    assert len(wanted) == 3
    assert wanted <= {option.removeprefix("-e ") for option in CLUSTER["docker"]["run_options"]}
    for group in groups(JOB):
        assert wanted <= {f"{each['name']}={each['value']}" for each in group["template"]["spec"]["containers"][0]["env"]}


@BOTH
def test_the_head_has_nothing_to_give(cluster: ClusterConfig) -> None:
    head = cluster()["available_node_types"]["head"]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert head.get("max_workers", 0) == 0


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("node", GPU_TYPES)
def test_every_gpu_type_has_the_memory_for_what_may_land_on_it(node: str, name: str) -> None:
    each = TYPES[node]
    found = plan.plan(recipe(name), f"{KIND[each['node_config']['InstanceType']]}:{each['resources']['GPU']}", [], [], None)
    assert {key: part["fits"] for key, part in found["memory"].items()} == dict.fromkeys(found["memory"], True)


@BOTH
def test_idle_time_outs_outlast_what_lies_between_two_uses(cluster: ClusterConfig) -> None:
    """Where types take turns: the teacher's waits while the student is trained, measured and attempts, the other meanwhile."""
    found = cluster()

    def timeout(name: str) -> float:
        return float(found["available_node_types"][name].get("idle_timeout_s") or 60 * found["idle_timeout_minutes"])

    stages = [
        {key: each["wall_seconds"] for key, each in one["stages"].items()}
        for name in ("math", "mmlu_pro", "numina-paper")
        for one in plan.plan(recipe(name), None, [], [], None)["rounds"]
    ]
    between = max(sum(seconds for key, seconds in each.items() if key != "rationales") for each in stages)
    assert timeout("teacher") == timeout("teacher_spot") > 1.5 * between
    math = [each["stages"]["rationales"]["wall_seconds"] for each in plan.plan(recipe("math"), None, [], [], None)["rounds"]]
    assert timeout("training") > 1.25 * max(math)


@pytest.mark.parametrize("name", ["math", "mmlu_pro", "numina-paper"])
def test_a_recipe_s_comment_says_what_its_plan_says(name: str) -> None:
    text = (ROOT / "jobs" / "recipes" / f"{name}.toml").read_text()
    said = re.search(r"# Plan: (\d+) GPU-hours, ([\d.]+) hours on eight H100s", text)
    found = plan.plan(recipe(name), None, [], [], None)
    digits = len(said[2].partition(".")[2]) if said else 0
    assert said and (float(said[1]), float(said[2])) == (round(found["gpu_hours"]), round(found["wall_hours"], digits))
    assert f"`undo-ray plan jobs/recipes/{name}.toml`" in text


# -- the image and the upload -------------------------------------------------------------------------------------------


def test_one_image_of_the_pinned_ray() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    [version] = [each.rpartition("==")[2] for each in extra if each.startswith("ray[")]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{version}-py311-cu130\n" in dockerfile
    assert "-c requirements/gpu.lock '.[gpu]'" in dockerfile
    image = CLUSTER["docker"]["image"]
    assert image.endswith(f"/undo-ray:{version}")
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups(JOB)} == {image}
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == version
    lock = (ROOT / "requirements" / "gpu.lock").read_text()
    assert f"\nray=={version}\n" in lock and "\ncuda-toolkit==13.0." in lock and "Python 3.11" in lock  # -py311-cu130


def test_the_image_is_built_from_files_that_are_there() -> None:
    sources = re.findall(r"^COPY --chown=ray (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    named = [path for group in sources for path in group.split()]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(named) == sorted(kept) and all((ROOT / path).is_file() for path in named)


def test_a_job_takes_the_code_along_but_no_environment_and_no_runs(tmp_path: Path) -> None:
    """As `ray job submit --working-dir .` packs it; the dashboard takes 100 MiB."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    files = "jobs/undo.py jobs/recipes/math.toml undo_ray/loop.py undo_ray/mini/teacher/model.safetensors .gitignore".split()
    ignored = ".venv/lib/torch.so runs/mini/report.json .git/objects/pack build/lib/a.py undo_ray/__pycache__/loop.pyc".split()
    for name in [*files, *ignored]:
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes() if name in files else b"x")
    create_package(str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == set(files)
    parts = [path for part in ("undo_ray", "jobs", "docs", "tests") for path in (ROOT / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in parts if "__pycache__" not in path.parts) < 0.2 * DASHBOARD_CLIENT_MAX_SIZE

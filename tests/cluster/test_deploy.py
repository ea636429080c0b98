"""The deploy files say what exists: schemas, options, paths, ports, labels, metrics.

KubeRay's own schema cannot be had offline; the models here are the parts of its CRD reference
(v1.5) that the files use, with nothing else allowed. `ray up` and Serve bring their schemas along.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

import click
import jsonschema
import pytest
import typer.main
import yaml
from pydantic import BaseModel, ConfigDict, Field

from goldcrest.cluster.job_package import SECRETS
from goldcrest.cluster.profile import NodeKind, Profile
from goldcrest.pipelines import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
IMAGE = "/app/"  # where the image has the repository
RAY = "2.60.0"


class Strict(BaseModel):
    """Nothing but the named fields."""

    model_config = ConfigDict(extra="forbid")


class PodTemplate(Strict):
    """A pod; of its spec only what the tests look at is typed."""

    metadata: dict[Literal["labels"], dict[str, str]]
    spec: dict[str, Any]


class AuthOptions(Strict):
    """KubeRay >= 1.5.1."""

    mode: Literal["token", "disabled"]


class AutoscalerOptions(Strict):
    """The autoscaler's container and how fast it shrinks."""

    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(gt=0)  # noqa: N815 - the field's name


class HeadGroup(Strict):
    """The head pod."""

    labels: dict[str, str] = {}  # of the Ray node; KubeRay >= 1.5
    rayStartParams: dict[str, str]  # noqa: N815
    template: PodTemplate


class WorkerGroup(HeadGroup):
    """One kind of worker pod."""

    groupName: str  # noqa: N815
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=1)  # noqa: N815


class Cluster(Strict):
    """A RayClusterSpec."""

    rayVersion: str  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    enableInTreeAutoscaling: bool = False  # noqa: N815
    autoscalerOptions: AutoscalerOptions | None = None  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815


class JobSpec(Strict):
    """A RayJobSpec."""

    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: int  # noqa: N815
    backoffLimit: int  # noqa: N815
    rayClusterSpec: Cluster  # noqa: N815
    submitterPodTemplate: PodTemplate  # noqa: N815


class UpgradeStrategy(Strict):
    """A RayServiceUpgradeStrategy."""

    type: Literal["None", "NewCluster", "NewClusterWithIncrementalUpgrade"]


class ServiceSpec(Strict):
    """A RayServiceSpec."""

    upgradeStrategy: UpgradeStrategy  # noqa: N815
    excludeHeadPodFromServeSvc: bool  # noqa: N815
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: Cluster  # noqa: N815


class Metadata(Strict):
    """Name and labels of an object."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$")
    labels: dict[str, str] = {}


class RayJob(Strict):
    """The whole file."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Strict):
    """The whole file."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def job() -> JobSpec:
    return RayJob.model_validate(read("rayjob.yaml")).spec


def service() -> ServiceSpec:
    return RayService.model_validate(read("rayservice.yaml")).spec


CLUSTERS = [lambda: job().rayClusterSpec, lambda: service().rayClusterConfig]


def mounts(pod: PodTemplate) -> list[dict[str, Any]]:
    return [mount for each in pod.spec["containers"] for mount in each.get("volumeMounts", [])]


def inside(path: str, pod: PodTemplate) -> bool:
    """Whether a path lies in one of the folders that the pod mounts."""
    return any(Path(path).is_relative_to(mount["mountPath"]) for mount in mounts(pod))


def goldcrest_options(words: list[str]) -> dict[str, Any]:
    """The parameters of a goldcrest command; it raises for what it does not know."""
    command: Any = typer.main.get_command(cli.app)
    name, *arguments = words
    verb = command.commands[name]
    return dict(verb.make_context(name, arguments).params)


def ray_options(words: list[str]) -> dict[str, Any]:
    """The same of a `ray` command."""
    from ray.scripts.scripts import cli as ray_cli

    name, *arguments = words
    return dict(ray_cli.commands[name].make_context(name, arguments).params)


def pods(cluster: Cluster) -> list[PodTemplate]:
    return [group.template for group in [cluster.headGroupSpec, *cluster.workerGroupSpecs]]


def containers(cluster: Cluster) -> list[dict[str, Any]]:
    return [container for pod in pods(cluster) for container in pod.spec["containers"]]


def autoscaled_kinds() -> dict[str, NodeKind]:
    """What Ray's autoscaler takes each worker group of the job for: it asks for them by that."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    spec = read("rayjob.yaml")["spec"]["rayClusterSpec"]
    cluster = {"metadata": {"namespace": "n", "name": "c"}, "spec": spec}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return {
        group.groupName: NodeKind(
            name=group.groupName,
            cpus=types[group.groupName]["resources"]["CPU"],
            gpus=types[group.groupName]["resources"].get("GPU", 0),
            memory=types[group.groupName]["resources"]["memory"],
            labels=types[group.groupName]["labels"],
        )
        for group in job().rayClusterSpec.workerGroupSpecs
    }


def test_the_job_s_command_is_one_that_exists() -> None:
    words = shlex.split(job().entrypoint)
    assert words[:3] == ["python", "-m", "goldcrest"]
    options = goldcrest_options(words[3:])
    assert options["pipeline"] == "speaker"
    for given in (options["config"], options["profile"]):
        assert (ROOT / given.removeprefix(IMAGE)).is_file()
    for path in (options["store"], options["corpus"][0], str(options["json_file"])):
        assert all(inside(path, pod) for pod in pods(job().rayClusterSpec)), path


def test_the_job_s_profile_finds_its_pools() -> None:
    """Every label that the profile asks for is that of a worker group, GPUs where it wants them."""
    options = goldcrest_options(shlex.split(job().entrypoint)[3:])
    profile = Profile.load(ROOT / options["profile"].removeprefix(IMAGE))
    kinds = autoscaled_kinds()
    for wanted in profile.steps.values():
        (kind,) = (k for k in kinds.values() if wanted.labels == k.labels)
        assert (wanted.gpus or 0) <= kind.gpus


def test_a_run_starts_while_a_pool_of_the_job_is_at_zero() -> None:
    """Its profile lists what may still be added, as the autoscaler knows it."""
    options = goldcrest_options(shlex.split(job().entrypoint)[3:])
    profile = Profile.load(ROOT / options["profile"].removeprefix(IMAGE))
    kinds = autoscaled_kinds()
    groups = job().rayClusterSpec.workerGroupSpecs
    assert any(group.minReplicas == 0 for group in groups)
    growing = [kinds[g.groupName] for g in groups if g.maxReplicas > g.minReplicas]
    assert list(profile.autoscaler) == growing


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_pools_are_labels_of_the_groups_and_no_options_of_ray_start(cluster: Any) -> None:
    """KubeRay >= 1.5 refuses them there, and the autoscaler would not see them."""
    spec: Cluster = cluster()
    for group in [spec.headGroupSpec, *spec.workerGroupSpecs]:
        assert "labels" not in group.rayStartParams
    assert [g.labels for g in spec.workerGroupSpecs] == [
        {"pool": g.groupName} for g in spec.workerGroupSpecs
    ]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_asks_for_a_token_and_gives_pods_what_they_say(cluster: Any) -> None:
    spec: Cluster = cluster()
    assert spec.authOptions.mode == "token"
    assert spec.rayVersion == RAY
    for container in containers(spec):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert "privileged" not in container["securityContext"]
    for group in [spec.headGroupSpec, *spec.workerGroupSpecs]:
        volumes = {volume["name"] for volume in group.template.spec.get("volumes", [])}
        assert {m["name"] for m in mounts(group.template)} == volumes
        assert group.template.metadata["labels"] == {"app.kubernetes.io/name": "goldcrest"}
        words = [f"--{name}={value}" for name, value in group.rayStartParams.items()]
        ray_options(["start", "--head", *words])


def test_every_node_of_the_job_sees_the_same_folders() -> None:
    first, *others = [mounts(pod) for pod in pods(job().rayClusterSpec)]
    assert all(each == first for each in others)


def test_every_pod_runs_as_the_user_of_the_image() -> None:
    """By number: of a name the kubelet cannot tell that it is not root's. Volumes and secrets come
    as root's, so the pods say whose group they are to be."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    ((user, group),) = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user != "0" and f"useradd --uid {user} --gid {group} " in text
    every = [pod for cluster in CLUSTERS for pod in pods(cluster())]
    for pod in [*every, job().submitterPodTemplate]:
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
        assert context["fsGroup"] == int(group)
        for container in pod.spec["containers"]:  # none is an exception
            assert not {"runAsUser", "runAsGroup", "runAsNonRoot"} & set(
                container["securityContext"]
            )


def test_the_drain_before_a_spot_node_ends_is_a_command_of_this_ray() -> None:
    (gpu,) = (g for g in job().rayClusterSpec.workerGroupSpecs if g.groupName == "gpu")
    hook = gpu.template.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:2] == ["sh", "-c"]
    drain, _, wait = hook[2].partition("&&")
    options = ray_options(shlex.split(drain)[1:])
    assert options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    deadline = options["deadline_remaining_seconds"]
    assert shlex.split(wait) == ["sleep", str(deadline)]
    assert deadline < gpu.template.spec["terminationGracePeriodSeconds"]


def test_the_service_is_what_serve_would_write(tmp_path: Path) -> None:
    """The file that `goldcrest serve --write-config` makes, but for the proxies of more nodes."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from goldcrest.pipelines.cli_serve import write_serve_config
    from goldcrest.pipelines.endpoints.speaker import SERVED, SpeakerSettings
    from goldcrest.pipelines.endpoints.speaker import application as builder
    from goldcrest.pipelines.endpoints.speaker_choice import ModelChoice

    config = yaml.safe_load(service().serveConfigV2)
    assert config.pop("proxy_location") == "EveryNode"
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert call_user_app_builder_with_args_if_necessary(builder, application["args"]) is not None
    written = tmp_path / "serve.yaml"
    write_serve_config(
        written,
        SERVED,
        SpeakerSettings.model_validate(application["args"]),
        ModelChoice.model_validate(application["deployments"][0]["user_config"]),
        **config["http_options"],
    )
    assert config == {
        name: value
        for name, value in yaml.safe_load(written.read_text()).items()
        if name != "proxy_location"
    }


def test_the_service_s_state_has_one_cluster_at_a_time() -> None:
    """A claim that one node has (ReadWriteOnce) and one SQLite file: no second cluster beside."""
    claims = [v for pod in pods(service().rayClusterConfig) for v in pod.spec.get("volumes", ())]
    assert any(v.get("persistentVolumeClaim") == {"claimName": "goldcrest-state"} for v in claims)
    assert service().upgradeStrategy.type == "None"


def test_the_service_s_folders_are_where_its_replicas_are() -> None:
    """The HTTP side goes where the state is; the model to any node with cores."""
    from goldcrest.pipelines.endpoints.speaker import SpeakerSettings

    (application,) = yaml.safe_load(service().serveConfigV2)["applications"]
    settings = SpeakerSettings.model_validate(application["args"])
    (bundle,) = application["deployments"][0]["user_config"]["bundles"].values()
    cluster = service().rayClusterConfig
    assert settings.api_resources and cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    homes = []
    for group in [cluster.headGroupSpec, *cluster.workerGroupSpecs]:
        (given,) = shlex.split(group.rayStartParams.get("resources", "{}"))  # a shell's word
        if settings.api_resources.keys() <= json.loads(given).keys():
            homes.append(group)
        assert inside(str(settings.state_folder), group.template) is (group in homes)
    (home,) = homes
    assert isinstance(home, WorkerGroup) and home.maxReplicas == 1  # one node, one file
    assert settings.token_file is not None and inside(str(settings.token_file), home.template)
    assert all(inside(bundle, group.template) for group in cluster.workerGroupSpecs)


def test_the_network_policy_fences_every_pod_and_opens_named_ports() -> None:
    policy = read("network-policy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for cluster in CLUSTERS:
        for group in [cluster().headGroupSpec, *cluster().workerGroupSpecs]:
            wanted = spec["podSelector"]["matchLabels"]
            assert wanted.items() <= group.template.metadata["labels"].items()
    open_ports = {port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])}
    declared = {p["containerPort"] for c in CLUSTERS for k in containers(c()) for p in k["ports"]}
    assert open_ports == {8265, 8080, 8000} <= declared
    for rule in spec["ingress"]:
        assert rule["from"], "a rule without `from` lets everybody in"
        assert "ports" in rule or rule["from"] == [{"podSelector": spec["podSelector"]}]


def test_the_pod_that_submits_the_job_is_let_in() -> None:
    """Its dashboard is the first thing that a job needs, and the policy opens it to few."""
    pod = job().submitterPodTemplate
    selectors = [
        peer.get("podSelector", {}).get("matchLabels")
        for rule in read("network-policy.yaml")["spec"]["ingress"]
        if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])
        for peer in rule["from"]
    ]
    assert any(s and s.items() <= pod.metadata["labels"].items() for s in selectors)
    assert "app.kubernetes.io/name" not in pod.metadata["labels"]  # no other port of the nodes
    # A Job's pod may not be one that always starts again; its first container is the operator's
    # to fill: a command or a token of its own would take the place of what the operator gives.
    assert pod.spec["restartPolicy"] == "Never"
    (container,) = pod.spec["containers"]
    assert not {"command", "args", "env"} & set(container)
    (head,) = job().rayClusterSpec.headGroupSpec.template.spec["containers"]
    assert container["image"] == head["image"]
    assert container["securityContext"] == head["securityContext"]
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_ray_up() -> None:
    import ray.autoscaler

    config = read("ray-up.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert config.pop("min_workers") == len(
        config["provider"]["worker_ips"]
    )  # of type `local` only
    jsonschema.validate(config, schema)
    assert "~/.ray/auth_token" in config["file_mounts"]
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        words = shlex.split(command)
        place = next(i for i, word in enumerate(words) if word.endswith("/ray"))
        if words[place + 1] == "stop":
            continue
        assert "RAY_AUTH_MODE=token" in words[:place]
        options = ray_options(words[place + 1 :])
        assert options["dashboard_host"] in ("127.0.0.1", "localhost")
    (submit,) = re.findall(
        r"^#   goldcrest (submit .*)$", (DEPLOY / "ray-up.yaml").read_text(), re.M
    )
    options = goldcrest_options(shlex.split(submit))
    assert (ROOT / "configs" / "speaker" / f"{options['config']}.yaml").is_file()
    assert (ROOT / "configs" / "cluster" / f"{options['profile']}.yaml").is_file()


def test_ray_up_copies_no_secrets_but_the_cluster_s_token() -> None:
    """Ray gives the rules to rsync for every mount, also for the one file of Ray's own token."""
    config = read("ray-up.yaml")
    rules = config["rsync_exclude"]
    # As `!x/` in .gitignore: a folder of that name goes; with rsync the first rule counts.
    wanted = [f"+ {s[1:]}" if s.startswith("!") else s for s in SECRETS if "auth_token" not in s]
    assert sorted(set(wanted) - set(rules)) == []
    assert rules.index("+ token/") < rules.index("token")
    assert rules.index("+ *.token/") < rules.index("*.token")
    for source in config["file_mounts"].values():
        assert not any(fnmatch.fnmatch(Path(source).name, rule) for rule in rules), source
    assert config["rsync_filter"] == [".gitignore"]  # names the tree's own auth_token, too


@pytest.mark.parametrize("nodes", ["head", "worker"])
def test_a_job_s_python_on_one_s_own_machines_is_that_of_the_environment(
    nodes: str, tmp_path: Path
) -> None:
    """A job's `python` is found by the PATH that `ray start` had; Ray adds nothing to it."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "python"):  # in place of Ray: what it would start for a job
        (programs / name).write_text("#!/bin/sh\n[ $1 = stop ] || command -v python\n")
        (programs / name).chmod(0o755)
    for command in read("ray-up.yaml")[f"{nodes}_start_ray_commands"]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "h"}
        shell = ["bash", "-c", f"true && ({command})"]  # each in a shell of its own, as by Ray
        done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(programs / "python")


def test_the_image_holds_what_the_files_name() -> None:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    for name in [word for line in copied for word in line.split()]:
        assert (ROOT / name).exists(), name
    assert {"goldcrest", "cluster", "kernels", "pipelines", "tasks", "configs"} <= set(copied)
    assert re.search(r"^WORKDIR /app$", text, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in text
    assert text.index("\nUSER ") > text.index("pip install")
    assert re.search(r"apt-get install .*\bwget\b", text)  # KubeRay's probes of health call it
    command = json.loads(re.findall(r"^CMD (.+)$", text, re.MULTILINE)[0])
    goldcrest_options(command[1:])
    tag = re.findall(r"-t (\S+)", text)[0]
    images = {c["image"] for cluster in CLUSTERS for c in containers(cluster())}
    assert images == {tag}
    assert re.search(rf"^ray==?={re.escape(RAY)}$", (ROOT / "constraints.txt").read_text(), re.M)


def scraped_port(scrape: dict[str, Any]) -> str:
    """The name of the pods' ports that a job of Prometheus keeps; of Goldcrest's pods only."""
    kept = {r["source_labels"][0]: r["regex"] for r in scrape["relabel_configs"] if "regex" in r}
    assert kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"] == "goldcrest"
    return str(kept["__meta_kubernetes_pod_container_port_name"])


def test_prometheus_scrapes_what_the_clusters_offer() -> None:
    jobs = {each["job_name"]: each for each in read("prometheus.yaml")["scrape_configs"]}
    nodes, endpoints = jobs["ray-pods"], jobs["endpoints"]
    scraped = set()
    for cluster in CLUSTERS:
        for container in containers(cluster()):
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            scraped.add(ports[scraped_port(nodes)])
    served = [
        {port["name"]: port["containerPort"] for port in container["ports"]}
        for group in service().rayClusterConfig.workerGroupSpecs
        for container in group.template.spec["containers"]
    ]
    http = yaml.safe_load(service().serveConfigV2)["http_options"]["port"]
    assert [ports[scraped_port(endpoints)] for ports in served] == [http] * len(served)
    # Ray asks nobody for a token there; the endpoint's gate asks for `Bearer`, the default here.
    assert "authorization" not in nodes
    assert set(endpoints["authorization"]) == {"credentials_file"}
    assert "metrics_path" not in endpoints  # /metrics
    opened = {
        port["port"]
        for rule in read("network-policy.yaml")["spec"]["ingress"]
        for port in rule.get("ports", [])
        if "monitoring" in str(rule["from"])
    }
    assert opened == scraped | {http}
    up = read("ray-up.yaml")
    hosts = [up["provider"]["head_ip"], *up["provider"]["worker_ips"]]
    machines = jobs["ray-machines"]["static_configs"][0]
    assert machines["targets"] == [f"{host}:8080" for host in hosts]


def test_the_dashboard_shows_metrics_that_ray_has() -> None:
    import ray.dashboard.modules.metrics.dashboards as panels

    sources = Path(panels.__file__ or next(iter(panels.__path__))).parent
    known = "".join(path.read_text(encoding="utf-8") for path in sources.rglob("*_panels.py"))
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    seen: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = (panel["gridPos"]["x"], panel["gridPos"]["y"])
        assert place not in seen and panel["description"]
        seen.add(place)
        for target in panel["targets"]:
            names = re.findall(r"\bray_\w+", target["expr"])
            assert names and all(name in known for name in names), target["expr"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):  # typer brings a click of its own
        goldcrest_options(["run", "speaker", "--confg", "x"])
    with pytest.raises(click.UsageError, match="No such option"):
        ray_options(["start", "--head", "--lable=pool=cpu"])

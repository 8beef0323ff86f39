"""Reads specs and environments that must be right; see `check` for finding what is wrong."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from trainyard.errors import NotFound
from trainyard.names import check_name
from trainyard.spec.check import InvalidSpec, check_environments, check_spec
from trainyard.spec.environments import Environments
from trainyard.spec.model import ModelSpec
from trainyard.spec.sentences import choose
from trainyard.spec.yaml_source import parse_yaml, read_bytes, read_yaml


def load_spec(path: Path) -> ModelSpec:
    """Return the model spec in a file.

    Raises:
        NotFound: there is no such file.
        InvalidSpec: it has mistakes; the message names all of them.
        BadInput: it cannot be read.
    """
    checked = check_spec(read_yaml(path))
    if checked.problems:
        raise InvalidSpec(checked.problems)
    return checked.root


def load_environments(path: Path) -> Environments:
    """Return the environments in a file. Raises as `load_spec`."""
    return _environments(path, read_bytes(path))


@lru_cache(maxsize=8)
def _environments(path: Path, content: bytes) -> Environments:
    """Return the environments in this content; DAG files ask for the same ones many times."""
    checked = check_environments(parse_yaml(content, path))
    if checked.problems:
        raise InvalidSpec(checked.problems)
    return checked.root


class Catalogue:
    """A folder of model specs, one `<model>.yaml` each."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`; it is read at each call."""
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of the models, sorted. A folder that does not exist has none."""
        return sorted(path.stem for path in self.paths())

    def paths(self) -> list[Path]:
        """Return the spec files, sorted."""
        return sorted(path for path in self.folder.glob("*.yaml") if not path.name.startswith("."))

    def path(self, model: str) -> Path:
        """Return the spec file of a model.

        Raises:
            BadInput: this cannot be a model's name.
            NotFound: there is no such model; the message names the nearest.
        """
        check_name(model, "Model")
        path = self.folder / f"{model}.yaml"
        if not path.is_file():
            names = self.names()
            raise NotFound(
                f"There is no model {model!r} in {self.folder}.",
                hint=choose(model, names) if names else f"Write {path}.",
            )
        return path

    def load(self, model: str) -> ModelSpec:
        """Return the spec of a model. Raises as `path` and `load_spec`."""
        return load_spec(self.path(model))

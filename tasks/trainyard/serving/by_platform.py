"""A host for environments on several platforms: each call goes to the host of its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainyard.documents.release import Release
from trainyard.errors import NotFound
from trainyard.serving.protocol import Host, ServerStatus


class HostByPlatform:
    """The `Host` of all environments of an installation."""

    def __init__(self, hosts: Mapping[str, Host], platforms: Mapping[str, str]) -> None:
        """Use `hosts`, by platform, for the environments that `platforms` names."""
        self._hosts = hosts
        self._platforms = platforms

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        """Wish for `replicas` servers of `release`; also scales an existing deployment."""
        self._of(environment).deploy(environment, release, replicas)

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        """Wish for `replicas` servers of an adopted release."""
        self._of(environment).scale(environment, release_id, replicas)

    def remove(self, environment: str, release_id: str) -> None:
        """Wish for no servers of the release: drain, then stop."""
        self._of(environment).remove(environment, release_id)

    def hold_autoscaling(self, environment: str, model: str) -> None:
        """Let nothing but us change the number of the model's servers."""
        self._of(environment).hold_autoscaling(environment, model)

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        """Let autoscalers work again, on the servers of `release_id`."""
        self._of(environment).resume_autoscaling(environment, model, release_id)

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        """Return every server of the model in the environment, of whatever release."""
        return self._of(environment).servers(environment, model)

    def _of(self, environment: str) -> Host:
        platform = self._platforms.get(environment)
        if platform is None:
            raise NotFound(
                f"There is no environment {environment}.",
                hint=f"There are: {', '.join(self._platforms) or 'none'}.",
            )
        return self._hosts[platform]

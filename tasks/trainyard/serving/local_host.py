"""The host of the local platform: writes down what is wished, reads what the agent made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from trainyard.documents.release import Release
from trainyard.errors import BadInput, NotFound
from trainyard.names import check_name
from trainyard.serving.protocol import ServerStatus
from trainyard.serving.records import (
    DesiredServers,
    ObservedServer,
    ServingPaths,
    desired_servers,
    is_held,
    observed_servers,
    read_record,
    server_name,
    write_record,
)
from trainyard.settings import Settings


class LocalHost:
    """The `Host` of the local platform."""

    def __init__(self, settings: Settings) -> None:
        """Use the home that `settings` names; its agent does the work."""
        self._paths = ServingPaths.of(settings)

    def deploy(self, environment: str, release: Release, replicas: int) -> None:
        """Wish for `replicas` servers of `release`; also scales an existing deployment.

        Raises:
            BadInput: the number or a name is not valid.
        """
        if replicas < 0:
            raise BadInput(f"{replicas} servers of {release.release_id} make no sense.")
        path = self._paths.desired(environment, release.release_id)
        known = read_record(path, DesiredServers)
        if known is not None and known.replicas == replicas:
            return
        wish = DesiredServers(
            environment=environment,
            model=check_name(release.model, "Model"),
            release_id=release.release_id,
            replicas=replicas,
            wished_at=datetime.now(UTC),
        )
        write_record(path, wish)

    def scale(self, environment: str, release_id: str, replicas: int) -> None:
        """Refuse: on this machine every server is one of ours.

        Raises:
            NotFound: always.
        """
        raise NotFound(
            f"{release_id} has no servers in {environment} that somebody else deployed.",
            hint="Servers are adopted on platform kubernetes only.",
        )

    def remove(self, environment: str, release_id: str) -> None:
        """Wish for no servers of the release: drain, then stop."""
        self._paths.desired(environment, release_id).unlink(missing_ok=True)

    def hold_autoscaling(self, environment: str, model: str) -> None:
        """Do nothing: nobody scales servers on this machine."""

    def resume_autoscaling(self, environment: str, model: str, release_id: str) -> None:
        """Do nothing: nobody scales servers on this machine."""

    def servers(self, environment: str, model: str) -> Sequence[ServerStatus]:
        """Return every server of the model in the environment, of whatever release."""
        observed = {
            server.name: server
            for server in observed_servers(self._paths)
            if (server.environment, server.model) == (environment, model)
        }
        found = [_status(server) for server in observed.values()]
        wishes = [
            wish
            for wish in desired_servers(self._paths)
            if (wish.environment, wish.model) == (environment, model)
        ]
        waiting = [name for wish in wishes for name in slots(wish) if name not in observed]
        found += self._not_begun(waiting) if waiting else []
        return sorted(found, key=lambda server: server.name)

    def _not_begun(self, names: Sequence[str]) -> list[ServerStatus]:
        message = (
            "The agent has not begun with it yet."
            if is_held(self._paths.agent_lock)
            else "The agent does not run; `trainyard up` starts it."
        )
        return [
            ServerStatus(name, name.rpartition("-")[0], "starting", "", None, 0, message)
            for name in names
        ]


def slots(wish: DesiredServers) -> Iterator[str]:
    """Yield the names of the servers that a wish is for."""
    for index in range(wish.replicas):
        yield server_name(wish.release_id, index)


def _status(server: ObservedServer) -> ServerStatus:
    """Return a server's status; a process that is gone is not ready, whatever its record says."""
    state, message = server.state, server.message
    if state == "ready" and not server.alive:
        state, message = "unhealthy", "Its process is gone; the agent will start it again."
    return ServerStatus(
        name=server.name,
        release_id=server.release_id,
        state=state,
        url=server.url,
        started_at=server.started_at,
        restarts=server.restarts,
        message=message,
    )

"""The router of the local platform, as the rollout asks it."""

from __future__ import annotations

import logging

from trainyard.serving.protocol import RouteStatus
from trainyard.serving.records import ProxyRecord, ServingPaths, read_record
from trainyard.serving.status_socket import ask
from trainyard.settings import Settings

log = logging.getLogger(__name__)


class LocalRouter:
    """The `Router` of the local platform: asks the proxy of a home."""

    def __init__(self, settings: Settings, *, timeout_s: float = 2.0) -> None:
        """Ask the proxy of the home that `settings` names, and wait so long for its answer."""
        self._paths = ServingPaths.of(settings)
        self._timeout_s = timeout_s

    def status(self, environment: str, model: str) -> RouteStatus | None:
        """Return what the proxy does now; None if it does not answer or knows no such channel."""
        record = read_record(self._paths.proxy, ProxyRecord)
        if record is None:
            return None
        try:
            return ask(record.socket, environment, model, timeout_s=self._timeout_s)
        except (OSError, ValueError) as error:
            log.debug("The proxy does not answer: %s", error)
            return None

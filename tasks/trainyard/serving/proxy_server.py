"""The web server under a proxy: the same one on this machine and in a cluster."""

from __future__ import annotations

import signal

import uvicorn

from trainyard.serving.proxy_app import ProxyApp
from trainyard.settings import Settings

IDLE_CLIENT_S = 4100
"""Seconds before an idle connection of a client is closed. Clients must go first (httpx after 5 s,
AWS's load balancers after 60 s by default and 4,000 s at most), or a request could meet one that is
just being closed."""


def server_config(app: ProxyApp, settings: Settings) -> uvicorn.Config:
    """Return how a proxy is served: what servers answer passes unchanged, streams end as they do.

    SIGTERM and SIGINT end the serving, not the process.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn ends on these, and then raises them again for whoever handled them before.
        signal.signal(number, lambda *_: None)
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        # The servers' answers carry them already.
        server_header=False,
        date_header=False,
        timeout_keep_alive=IDLE_CLIENT_S,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )

"""How requests to a Prometheus prove who asks. No secret is kept longer than a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx

from trainyard.errors import BadInput, Transient
from trainyard.spec.metrics import MetricsSource

SERVICE = "aps"
"""What AWS calls Amazon Managed Service for Prometheus in signatures."""


def auth_of(source: MetricsSource) -> httpx.Auth | None:
    """Return what signs requests to a source; None where it wants no signature."""
    if source.auth == "bearer":
        return BearerAuth(lambda: read_token(source))
    if source.auth == "sigv4":
        return SigV4Auth(source.region)
    return None


def read_token(source: MetricsSource) -> str:
    """Return the token for a source, from its file or the environment.

    Raises:
        BadInput: there is none. The message does not show what is there instead.
    """
    if source.token_file is not None:
        where = f"File {source.token_file}"
        try:
            token = Path(source.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{where} with the token for {source.url} cannot be read ({type(error).__name__}).",
                hint="Mount it, or name another one in metrics.token_file of the environment.",
            ) from error
    else:
        where = f"Variable {source.token_env}"
        token = os.environ.get(source.token_env, "").strip()
    if not token or not token.isascii() or any(mark.isspace() for mark in token):
        raise BadInput(
            f"{where} holds no token for {source.url}.",
            hint="Set it where the rollout is driven (Airflow's triggerer, or your shell).",
        )
    return token


class BearerAuth(httpx.Auth):
    """A token in the header `Authorization`."""

    def __init__(self, token: Callable[[], str]) -> None:
        """Ask `token` anew for each request."""
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign one request."""
        request.headers["Authorization"] = f"Bearer {self._token()}"
        yield request


class SigV4Auth(httpx.Auth):
    """AWS' signature, version 4, made by botocore."""

    requires_request_body = True

    def __init__(self, region: str = "") -> None:
        """Sign for a region; empty: that of AWS' configuration."""
        self._region = region
        self._session: Any = None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Sign one request.

        Raises:
            BadInput: there are no credentials, or no region.
            Transient: the service that gives credentials does not answer, or refuses.
        """
        from botocore.auth import SigV4Auth as Signer
        from botocore.awsrequest import AWSRequest

        credentials, region = self._credentials()
        signed = AWSRequest(
            method=request.method,
            url=str(request.url),
            data=request.content,
            headers={"Content-Type": request.headers.get("Content-Type", "")},
        )
        Signer(credentials, SERVICE, region).add_auth(signed)
        request.headers.update(dict(signed.headers.items()))
        yield request

    def _credentials(self) -> tuple[Any, str]:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        if self._session is None:
            self._session = boto3.Session(region_name=self._region or None)
        region = self._session.region_name
        try:
            found = self._session.get_credentials()
            frozen = found.get_frozen_credentials() if found is not None else None
        except (BotoCoreError, ClientError) as error:
            # Whoever gives temporary credentials does not answer, as a source that is away.
            raise Transient(f"no credentials to sign requests with: {error}") from None
        if frozen is None or not region:
            raise BadInput(
                "Requests to Amazon Managed Service for Prometheus cannot be signed: no "
                + ("credentials." if region else "region."),
                hint="Give the pod an IAM role with aps:QueryMetrics, or set metrics.region."
                if region
                else "Set metrics.region of the environment, or AWS_REGION.",
            )
        return frozen, region

"""One answer over HTTP, whole and in time, or none."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx

MOST_BYTES = 64 << 20
"""An answer that is larger is not ours."""


def answer(
    client: httpx.Client,
    url: str,
    *,
    timeout_s: float,
    form: Mapping[str, str] | None = None,
    auth: httpx.Auth | None = None,
) -> tuple[httpx.Response, bytes]:
    """Return the response of a server and its body.

    Args:
        client: to ask with.
        url: to GET, or to POST `form` to.
        timeout_s: for all of it; a server that sends a byte now and then is too late as well.
        form: fields to send.
        auth: signs the request.

    Raises:
        httpx.HTTPError: no answer, no good one, too late, or too large.
    """
    end = time.monotonic() + timeout_s
    method = "GET" if form is None else "POST"
    request = client.build_request(method, url, data=form, timeout=timeout_s)
    response = client.send(request, stream=True, auth=auth or httpx.USE_CLIENT_DEFAULT)
    try:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if time.monotonic() > end:
                raise httpx.ReadTimeout(f"no whole answer in {timeout_s:g} s", request=request)
            if len(body) > MOST_BYTES:
                raise httpx.DecodingError(f"more than {MOST_BYTES} bytes", request=request)
        response.raise_for_status()
        return response, bytes(body)
    finally:
        response.close()

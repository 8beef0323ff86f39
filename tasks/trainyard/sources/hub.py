"""A model on the Hugging Face Hub, or on a mirror that speaks its protocol.

A revision is a commit. One request tells the newest commit with all its files, their sizes and
their hashes: the sha256 of large files (LFS, Xet) and the git object id of small ones. Contents are
read by range requests at that commit, so that nothing changes under a download, a cut connection
costs no byte twice, and of weight files the header can be read alone.

Everything that is sent goes through huggingface_hub's own session, headers and error rules.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, no `__all__`
    build_hf_headers,
    get_token,
    hf_raise_for_status,
)

from trainyard import __version__
from trainyard.canonical import digest
from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError, Transient
from trainyard.settings import Settings
from trainyard.sources.files import inspect_files, unusable
from trainyard.sources.protocol import ResolvedRevision, SourceFile
from trainyard.sources.remote_file import RemoteReader, open_remote
from trainyard.sources.retrying import Failure
from trainyard.spec.model import HUB_REVISION_PATTERN, HuggingFaceSource
from trainyard.spec.patterns import selected

TOKEN_HINT = (
    "Set TRAINYARD_HUB_TOKEN or HF_TOKEN, or name an Airflow connection in TRAINYARD_HUB_CONNECTION"
)

_THROTTLED = frozenset({408, 429})
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource(RemoteReader):
    """A `Source` on the Hub."""

    def __init__(
        self,
        source: HuggingFaceSource,
        settings: Settings,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Use the model that `source` names; nothing is sent before a revision is resolved.

        Raises BadInput if the endpoint holds credentials.
        """
        super().__init__(settings.source_attempts, sleep)
        self._source = source
        self._timeout_s = settings.source_timeout_s
        token = settings.hub_token.get_secret_value() or get_token()
        self._has_token = bool(token)
        # False: a token that is not there is not searched for at every request.
        self._headers = build_hf_headers(
            token=token or False, library_name="trainyard", library_version=__version__
        )
        self._api = HfApi(
            endpoint=settings.hub_endpoint.rstrip("/") or None,
            token=token or False,
            library_name="trainyard",
            library_version=__version__,
        )
        self._endpoint = str(self._api.endpoint)
        if "@" in urlsplit(self._endpoint).netloc:
            # It is shown in messages and stored in manifests.
            raise BadInput("The URL of the Hub holds credentials.", hint=f"{TOKEN_HINT}.")

    def peek(self, revision: str | None) -> tuple[str, str]:
        """Return the commit and the fingerprint, with one request. Raises as `resolve`."""
        commit, files = self._listing(revision)
        return commit, _fingerprint(commit, files)

    def resolve(self, revision: str | None) -> ResolvedRevision:
        """Resolve a branch, tag or commit (None: the default branch) and check its files.

        After the one request of `peek` it reads the JSON files and the headers of weight files.

        Raises:
            NotFound: there is no such model or revision, or the token may not see it.
            BadInput: the token is refused, the model is gated, or files are refused, missing or
                broken; the message names all of them.
            Transient: the Hub cannot be reached, or answers with errors of its own.
        """
        commit, files = self._listing(revision)
        inspection = inspect_files(
            files,
            lambda file, start, size: self._open(commit, file, start, size),
            allow_files=self._source.allow_files,
            leave_out="leave them out with `ignore_patterns`",
        )
        if inspection.problems:
            raise unusable(commit, self._uri, inspection.problems)
        return ResolvedRevision(
            revision=commit,
            uri=f"{self._uri}/tree/{commit}",
            files=inspection.files,
            fingerprint=_fingerprint(commit, files),
            allowed=inspection.allowed,
        )

    @property
    def _uri(self) -> str:
        return f"{self._endpoint}/{self._source.repo}"

    def _listing(self, revision: str | None) -> tuple[str, tuple[SourceFile, ...]]:
        """Return the commit and those of its files that the spec's patterns select, sorted."""
        if revision is not None and (
            not re.fullmatch(HUB_REVISION_PATTERN, revision) or ".." in revision
        ):
            raise BadInput(
                f"{revision!r} is no revision of a model on the Hub.",
                hint="Use a branch, a tag or a commit.",
            )
        where = f"revision {revision!r} of {self._source.repo}" if revision else self._source.repo
        info = self._retries.call(
            lambda: self._api.model_info(
                self._source.repo,
                revision=revision,
                files_metadata=True,
                timeout=self._timeout_s,
            ),
            lambda error: self._failure(error, where),
        )
        if not _COMMIT.fullmatch(str(info.sha)) or info.siblings is None:
            raise self._no_hub("it names no commit")
        source = self._source
        files = [
            self._file(sibling)
            for sibling in info.siblings
            if selected(
                sibling.rfilename, allow=source.allow_patterns, ignore=source.ignore_patterns
            )
        ]
        return str(info.sha), tuple(sorted(files, key=lambda file: file.path))

    def _file(self, sibling: RepoSibling) -> SourceFile:
        # A large file's blob id names the pointer that git keeps in its place.
        if sibling.lfs is not None:
            return SourceFile(
                path=sibling.rfilename,
                size=sibling.lfs.size,
                sha256=sibling.lfs.sha256,
                version=sibling.lfs.sha256,
            )
        if sibling.size is None or sibling.blob_id is None:
            raise self._no_hub(f"it tells no size or hash of {sibling.rfilename!a}")
        return SourceFile(
            path=sibling.rfilename,
            size=sibling.size,
            git_blob_id=sibling.blob_id,
            version=sibling.blob_id,
        )

    def _remote(self, revision: str, file: SourceFile, start: int, size: int) -> BinaryIO:
        url = hf_hub_url(self._source.repo, file.path, revision=revision, endpoint=self._endpoint)
        name = f"{file.path} of {self._source.repo}"
        return open_remote(
            lambda first, end: self._fetch(url, file, first, end),
            start,
            size,
            name=name,
            retries=self._retries,
            judge=lambda error: self._failure(error, name),
        )

    def _fetch(self, url: str, file: SourceFile, first: int, end: int) -> Iterator[bytes]:
        """Yield bytes `first` up to `end` of a file."""
        session = get_session()
        request = session.build_request(
            "GET",
            url,
            headers={
                **self._headers,
                "range": f"bytes={first}-{end - 1}",
                # Compressed bytes have other positions.
                "accept-encoding": "identity",
            },
            timeout=self._timeout_s,
        )
        response = session.send(request, stream=True, follow_redirects=True)
        try:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else first
            _check_range(response, file, first)
            left = end - first
            # Without a size for the chunks, so that what arrived before a cut is not lost.
            for chunk in response.iter_raw():
                kept = chunk[skip:][:left]
                skip = max(0, skip - len(chunk))
                left -= len(kept)
                if kept:
                    yield kept
                if not left:
                    return
        finally:
            response.close()

    def _failure(self, error: Exception, where: str) -> Failure | None:
        """Tell what an exception means; none of the library's own texts, which may hold links that
        open a file to whoever has them."""
        if isinstance(error, HfHubHTTPError):
            return self._http_failure(error, where)
        if isinstance(error, httpx2.TimeoutException):
            return Failure(
                Transient(
                    f"{self._endpoint} did not answer for {self._timeout_s:g} s ({where}).",
                    hint="Try again; TRAINYARD_SOURCE_TIMEOUT_S sets how long to wait.",
                )
            )
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
            return Failure(
                BadInput(
                    f"{self._endpoint!r} is no URL of a Hub.",
                    hint="Correct TRAINYARD_HUB_ENDPOINT or HF_ENDPOINT.",
                )
            )
        if isinstance(error, OfflineModeIsEnabled):
            return Failure(
                BadInput(
                    "HF_HUB_OFFLINE forbids to reach the Hub.",
                    hint="Unset it, or use a source of kind local or s3.",
                )
            )
        if isinstance(error, HFValidationError):
            return Failure(BadInput(f"{self._source.repo!r} is no name of a model on the Hub."))
        if isinstance(error, httpx2.HTTPError):
            return Failure(
                Transient(
                    f"The connection to {self._endpoint} failed ({where}, {type(error).__name__}).",
                    hint="Check the network and the endpoint, then try again.",
                )
            )
        if isinstance(error, ValueError | KeyError | TypeError):  # while the answer was read
            return Failure(self._no_hub("its answer cannot be read"))
        return None

    def _http_failure(self, error: HfHubHTTPError, where: str) -> Failure:
        status = error.response.status_code
        if status in _THROTTLED or status >= 500:
            busy = "asks for fewer requests" if status == 429 else f"answered with {status}"
            return Failure(
                Transient(f"{self._endpoint} {busy} ({where}).", hint="Try again later."),
                retry_after_s=_retry_after_s(error.response),
            )
        return Failure(self._refusal(error, status, where))

    def _refusal(self, error: HfHubHTTPError, status: int, where: str) -> TrainyardError:
        token = "The token that is set" if self._has_token else "Without a token one"
        match error:
            case GatedRepoError():
                return BadInput(
                    f"{self._source.repo} is gated. {token} may not read it ({where}).",
                    hint=f"Ask for access at {self._uri}. {TOKEN_HINT} of an account that has it.",
                )
            case DisabledRepoError():
                return BadInput(
                    f"{self._source.repo} was disabled on the Hub.", hint="Use another model."
                )
            case RevisionNotFoundError():
                return NotFound(
                    f"There is no {where} on {self._endpoint}.",
                    hint=f"Branches, tags and commits: {self._uri}/commits.",
                )
            case RemoteEntryNotFoundError():
                return NotFound(f"There is no {where} on {self._endpoint}.", hint="Plan again.")
            case RepositoryNotFoundError():
                return NotFound(
                    f"There is no model {self._source.repo} on {self._endpoint}, or it is private. "
                    f"{token} cannot see it.",
                    hint=f"Check the name. For a private model: {TOKEN_HINT}.",
                )
        if status == 401:
            return BadInput(
                f"{self._endpoint} refuses the token that is set ({where}).",
                hint=f"It may have ended or been revoked. {TOKEN_HINT}.",
            )
        if status == 403:
            return BadInput(
                f"{token} may not read {where}.", hint=f"{TOKEN_HINT} that has the right to."
            )
        return BadInput(
            f"{self._endpoint} answered with {status} ({where}).",
            hint="Check `source` in the model's spec, and the endpoint.",
        )

    def _no_hub(self, why: str) -> BadInput:
        return BadInput(
            f"{self._endpoint} does not answer as the Hub does: {why}.",
            hint="Correct TRAINYARD_HUB_ENDPOINT or HF_ENDPOINT, or look at the proxy between.",
        )


def _fingerprint(commit: str, files: tuple[SourceFile, ...]) -> str:
    return digest([commit, [[file.path, file.size, file.version] for file in files]])


def _check_range(response: httpx2.Response, file: SourceFile, first: int) -> None:
    """Raise if the answer is about other bytes than those that were asked for."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
    if response.status_code != 206 or found is None:
        return
    if int(found[2]) != file.size:
        raise CorruptFile(
            f"{file.path} has {found[2]} bytes, and the Hub's listing says {file.size}.",
            hint="Try again; if it stays so, the file is damaged on the Hub.",
        )
    if int(found[1]) != first:
        raise Transient(
            f"{file.path} was answered from byte {found[1]} instead of {first}.",
            hint="Something between here and the Hub mixes up ranges. Try again.",
        )


def _retry_after_s(response: Any) -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:  # a date: our own waits are as good
        return 0.0

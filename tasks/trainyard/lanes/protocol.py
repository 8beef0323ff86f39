"""A lane as the steps and hosts see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainyard.documents.artifacts import BundleManifest
from trainyard.documents.behaviour import Capability
from trainyard.spec.model import BehaviourName, Target

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerCommand:
    """How to start a server: argument vector and the lane's own environment variables.

    The caller adds a minimal base environment (PATH, HOME, LANG, TMPDIR); nothing else of the
    caller's environment reaches the server, so that secrets do not either.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    answers: bool = True
    """False: it only compiles. It computes nothing, so it cannot answer a request, and it may end
    by itself with exit code 0 once everything is compiled."""


@dataclass(frozen=True)
class StartProof:
    """What a start tells about the use of its bundle."""

    used_bundle: bool
    reason: str
    """Why it counts as used or not, with the evidence (log line, new files)."""
    engine_init_s: float | None
    new_files: tuple[str, ...]


@dataclass(frozen=True)
class Returned:
    """What a lane's server can tell about its answers, for one target."""

    top_logprobs: int
    """Most tokens whose log-probs it returns at each position of an answer; 0: none."""
    prompt_logprobs: bool
    """Does it return log-probs of the tokens of a prompt? Tasks that compare given answers
    (log-likelihoods) need them."""
    why: str = ""
    """Why something is missing, as half a sentence; empty: nothing is."""


class Lane(Protocol):
    """One way to compile and serve."""

    name: str
    finishes_requests: bool
    """Does its server, when it is told to end, first answer what runs? If not, whoever ends it
    waits until nothing runs."""

    def problems(self, target: Target) -> Sequence[str]:
        """Return every rule of the lane that `target` breaks, each with the remedy."""

    def warnings(self, target: Target, config: Mapping[str, Any] | None = None) -> Sequence[str]:
        """Return what is allowed but should be known, each as sentences.

        `config` is the model's config.json, as far as it is known.
        """

    def returned(self, target: Target) -> Returned:
        """Return what the lane's server can tell about its answers."""

    def model_problems(self, target: Target, config: Mapping[str, Any]) -> Sequence[str]:
        """Return what the lane cannot do with a model of this config.json, with the remedy."""

    def capability(self, target: Target, name: BehaviourName) -> Capability:
        """Return what a server of `target` can do of one thing that the behaviour checks ask for.

        The tables are in `trainyard.lanes.capabilities`.
        """

    def toolchain(self, python: Path) -> dict[str, str]:
        """Return the versions that go into the compile key, as seen by the serving interpreter.

        Raises BadInput if the serving environment lacks them.
        """

    def toolchain_problems(self, target: Target, toolchain: Mapping[str, str]) -> Sequence[str]:
        """Return where `toolchain` is not the one that `target` asks for, with the remedy."""

    def key_inputs(
        self,
        target: Target,
        *,
        architecture_digest: str,
        toolchain: Mapping[str, str],
        draft_architecture_digest: str = "",
    ) -> dict[str, Any]:
        """Return everything that changes the compiled code and nothing that does not.

        `trainyard.identity` has the table of all fields.
        """

    def serving_settings(self, target: Target, *, served_model_name: str) -> dict[str, Any]:
        """Return the serving settings that the compile key leaves out."""

    def command(
        self,
        target: Target,
        *,
        python: Path,
        model_dir: Path,
        cache_dir: Path,
        served_model_name: str,
        port: int,
        cache_only: bool,
        host: str = LOOPBACK,
    ) -> ServerCommand:
        """Return the command that serves `model_dir` with `cache_dir` as its caches.

        It listens on `host` only: loopback, or a pod's own network. The same command compiles
        (empty `cache_dir`) and serves (restored `cache_dir`), but for `cache_only`: with it the
        start must fail rather than compile, where the lane can do that.
        """

    def misfits(self, target: Target, cache_dir: Path) -> Sequence[str]:
        """Return why a server of `target` could not start from `cache_dir` alone, each a sentence.

        Asked before a cache-only start. Only headers and small files are read: that the files are
        those of the bundle is checked when they are restored.
        """

    def start_timeout_s(self, *, cache_only: bool) -> float:
        """Return how many seconds a start may take at least, whatever the settings say."""

    def stage(self, log: str) -> str:
        """Return what a starting server does now, in a few words, from its log so far."""

    def keep_whole(self, cache_dir: Path, target: Target) -> int:
        """Remove from `cache_dir` what an attempt that was cut left half-done, failed or locked.

        Returns:
            How many finished graphs are left to build upon. 0: the folder is empty.
        """

    def capture(
        self, cache_dir: Path, target: Target | None = None
    ) -> tuple[Sequence[Path], Sequence[str]]:
        """Return the files of a bundle (relative to `cache_dir`) and what was dropped and why.

        With `target`, code that was compiled for another one does not count, as far as the code
        tells. Raises Refused if the caches hold no complete result of a compiler.
        """

    def snapshot(self, cache_dir: Path) -> frozenset[str]:
        """Return the names of the compiler's outputs below `cache_dir`, to compare two starts."""

    def missed(self, log: str) -> str:
        """Return the sentence that says that a cache-only start ended for lack of compiled code.

        Empty if the log tells nothing of the kind.
        """

    def prove_start(
        self,
        *,
        log: str,
        before: frozenset[str],
        after: frozenset[str],
        bundle: BundleManifest | None,
    ) -> StartProof:
        """Judge whether a start used its bundle, from its log and the files before and after."""

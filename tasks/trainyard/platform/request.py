"""Asking an Airflow for a release, a promotion or a rollback, once, from outside.

Run ids follow from the request, so that the same request twice is one run: Airflow allows an id
once, and whoever comes second attaches to the run of the first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from trainyard.canonical import digest, short
from trainyard.errors import BadInput, Refused, Transient
from trainyard.names import check_name, check_release_id
from trainyard.platform.airflow_api import AirflowApi

Verb = Literal["release", "promote", "rollback"]

ENDED = frozenset({"success", "failed"})
POLL_S = 2.0
"""Seconds between two looks at a run."""

MOST_MISSES = 10
"""Looks in a row that may fail; with the pauses between them that is about three minutes."""

LONGEST_PAUSE_S = 30.0
"""Between two looks while Airflow does not answer."""

MOST_ATTEMPTS = 50
"""Runs of the same request that are looked through for the newest."""

_QUIET = frozenset({"none", "scheduled", "queued", "None"})
"""States of a task that are no news."""


@dataclass(frozen=True)
class RunRequest:
    """What somebody asks an Airflow for."""

    verb: Verb
    dag_id: str
    conf: Mapping[str, Any]
    subject: str
    """What it is about: a model, or a release."""
    key: str = ""
    """Tells two requests for the same apart: the same key is the same request for ever."""

    @property
    def run_id(self) -> str:
        """The id of the run; the same for the same request and key."""
        content = {"conf": dict(self.conf), "key": self.key}
        return f"{self.verb}__{self.subject}__{short(digest(content))}"


def release_request(
    model: str,
    *,
    revision: str = "",
    targets: tuple[str, ...] = (),
    environments: tuple[str, ...] = (),
    overrides: Mapping[str, Any] | None = None,
    accept_unproven: bool = False,
    wait_for_window: bool = False,
    key: str = "",
) -> RunRequest:
    """Return the request for a release, and its promotion to `environments`. Raises BadInput."""
    conf: dict[str, Any] = {"model": check_name(model, "Model")}
    if revision:
        conf["revision"] = revision
    if targets:
        conf["targets"] = [check_name(each, "Target") for each in targets]
    if environments:
        conf["environments"] = [check_name(each, "Environment") for each in environments]
    if overrides:
        conf["overrides"] = dict(overrides)
    if accept_unproven:
        conf["accept_unproven"] = True
    if wait_for_window:
        conf["wait_for_window"] = True
    return RunRequest("release", "neuron_release", conf, model, key)


def promote_request(
    model: str,
    release_id: str,
    environment: str,
    *,
    force: bool = False,
    reason: str = "",
    wait_for_window: bool = False,
    key: str = "",
) -> RunRequest:
    """Return the request for a promotion. Raises BadInput."""
    conf: dict[str, Any] = {
        "model": check_name(model, "Model"),
        "release": check_release_id(release_id),
    }
    if force:
        if not reason:
            raise BadInput("A forced promotion needs a reason.", hint="Give --reason.")
        conf["force"] = True
    if wait_for_window:
        conf["wait_for_window"] = True
    if reason:
        conf["reason"] = reason
    dag_id = f"neuron_promote__{check_name(environment, 'Environment')}"
    return RunRequest("promote", dag_id, conf, release_id, key)


def rollback_request(
    model: str, environment: str, *, release_id: str = "", reason: str = "", key: str = ""
) -> RunRequest:
    """Return the request for a rollback.

    Raises:
        BadInput: a name is wrong, or neither a release nor a key is given: then a repeat would
            be another request, and tell that there is nothing to undo any more.
    """
    conf: dict[str, Any] = {"model": check_name(model, "Model")}
    if release_id:
        conf["release"] = check_release_id(release_id)
    elif not key:
        raise BadInput(
            "A rollback that names no release needs a key, or a repeat of it would be another "
            "request, with nothing left to undo.",
            hint="Name the release (--to), or give --key with something of this incident or job.",
        )
    if reason:
        conf["reason"] = reason
    dag_id = f"neuron_rollback__{check_name(environment, 'Environment')}"
    return RunRequest("rollback", dag_id, conf, release_id or model, key)


@dataclass(frozen=True)
class Asked:
    """The run that a request has."""

    run_id: str
    started: bool
    """False: somebody had asked for the same before."""
    state: str


def ask(api: AirflowApi, request: RunRequest) -> Asked:
    """Start the run of a request, or attach to it.

    With a key, the run of that key counts, whatever became of it. Without one, a run under way
    counts; once it has ended, asking again starts the next one.

    Raises:
        NotFound: there is no such DAG.
        BadInput: Airflow refuses the conf, or the login.
        Refused: this user may not start it.
        Transient: Airflow cannot be reached.
    """
    for attempt in range(1, MOST_ATTEMPTS + 1):
        run_id = request.run_id if attempt == 1 else f"{request.run_id}__{attempt}"
        if api.trigger(request.dag_id, run_id, request.conf):
            return Asked(run_id, True, "queued")
        found = api.run(request.dag_id, run_id)
        if found["conf"] != dict(request.conf):
            raise BadInput(
                f"Run {run_id} of {request.dag_id} exists with another conf: {found['conf']}.",
                hint="Give another --key.",
            )
        if request.key or found["state"] not in ENDED:
            return Asked(run_id, False, str(found["state"]))
    raise BadInput(
        f"The same was asked for {MOST_ATTEMPTS} times.", hint="Give a --key of this request."
    )


def wait(
    api: AirflowApi,
    dag_id: str,
    run_id: str,
    say: Callable[[str], None],
    *,
    timeout_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Say what happens in a run until it has ended, and return its results by task.

    An Airflow that does not answer for a while, such as one that starts again, is waited for.

    Raises:
        Refused: it failed; the message has what the first task to fail logged.
        Transient: Airflow cannot be reached for long, or the run takes too long.
    """
    deadline = clock() + timeout_s
    seen: dict[str, str] = {}
    misses = 0
    while True:
        try:
            state, results = _look(api, dag_id, run_id, seen, say)
        except Transient as error:
            misses += 1
            if misses == MOST_MISSES or clock() > deadline:
                raise
            if misses == 1:
                say(f"{error.message} Asking again; the run goes on meanwhile.")
        else:
            misses = 0
            if results is not None:
                return results
            if clock() > deadline:
                raise Transient(
                    f"Run {run_id} of {dag_id} is still {state} after {timeout_s:g} s.",
                    hint="It goes on. The same request again attaches to it.",
                )
        sleep(min(POLL_S * 2**misses, LONGEST_PAUSE_S))


def _look(
    api: AirflowApi, dag_id: str, run_id: str, seen: dict[str, str], say: Callable[[str], None]
) -> tuple[str, dict[str, Any] | None]:
    """Say what is new in a run; return its state, and its results once it has ended well."""
    state = api.run_state(dag_id, run_id)
    tasks = api.task_states(dag_id, run_id)
    for task in tasks:
        _tell(task, seen, say)
    if state == "failed":
        reason = _reason(api, dag_id, run_id, tasks)
        raise Refused(f"Run {run_id} of {dag_id} failed. {reason}".strip())
    return state, api.results(dag_id, run_id) if state == "success" else None


def _tell(task: Mapping[str, Any], seen: dict[str, str], say: Callable[[str], None]) -> None:
    index = task.get("map_index", -1)
    name = task["task_id"] + (
        f"[{task.get('rendered_map_index') or index}]" if index not in (-1, None) else ""
    )
    state = str(task.get("state"))
    if seen.get(name) != state:
        seen[name] = state
        if state not in _QUIET:
            say(f"{name}: {state.replace('_', ' ')}")


def _reason(api: AirflowApi, dag_id: str, run_id: str, tasks: list[dict[str, Any]]) -> str:
    """Return the last error of the task that failed first: later ones fail because of it."""
    failed = [task for task in tasks if task.get("state") == "failed"]
    for task in sorted(failed, key=lambda task: str(task.get("end_date") or "")):
        for line in reversed(api.log_lines(dag_id, run_id, task)):
            if line.get("level") in ("error", "critical"):
                return f"{task['task_id']}: {_error_of(line)}"
    return _told(api.results(dag_id, run_id))


def _told(results: Mapping[str, Any]) -> str:
    """Return why a run failed as its results tell it: they outlast the logs."""
    for task_id, result in results.items():
        # A mapped task has a list: one result for each of its targets that says something.
        for each in result if isinstance(result, list) else [result]:
            if isinstance(each, dict) and each.get("reason"):
                return f"{task_id}: {each['reason']}"
    return ""


def _error_of(line: Mapping[str, Any]) -> str:
    """Return what went wrong in a line of a log, which is an exception or just text."""
    details = line.get("error_detail")
    if isinstance(details, list) and details and isinstance(details[0], dict):
        value = details[0].get("exc_value")
        if value:
            return str(value)
    return str(line.get("event", ""))


def run_url(url: str, dag_id: str, run_id: str) -> str:
    """Return where people see a run."""
    return f"{url.rstrip('/')}/dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"


def parse_overrides(text: str) -> dict[str, Any]:
    """Return overrides from JSON. Raises BadInput."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadInput(f"The overrides are not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadInput('Overrides are an object, such as {"max_num_seqs": 4}.')
    return value

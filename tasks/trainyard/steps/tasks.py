"""The step `tasks`: ask the harness, where it will measure, about its own tasks.

It runs where steps are pods: the image that will measure is not where the plan is made. It takes no
device, and comes before everything that does.
"""

from __future__ import annotations

from trainyard.documents.base import Provenance
from trainyard.documents.harness import HarnessReport
from trainyard.documents.plan import Plan
from trainyard.errors import NotFound
from trainyard.lanes.registry import get_lane
from trainyard.steps.compile import planned_target
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.harness import ask_harness, problems_of
from trainyard.steps.planning import refuse
from trainyard.store.documents import create_document, read_document
from trainyard.store.layout import plan_key, tasks_key


def check_tasks(plan: Plan, target_name: str, context: StepContext) -> StepResult:
    """Ask this environment's harness about the tasks of a plan, or find that it was asked.

    Returns:
        The key of the report.

    Raises:
        BadInput: it knows no such task, a data set cannot be had, the target cannot answer, or this
            environment has no harness; the message names everything that is wrong.
        Transient: it did not answer in time.
    """
    planned = planned_target(plan, target_name)
    key = tasks_key(planned.measurement_id)
    try:
        return _result(key, read_document(context.store, key, HarnessReport), reused=True)
    except NotFound:
        pass
    names = plan.spec.gates.accuracy.own_tasks
    context.progress.say(f"Asking lm-evaluation-harness about {', '.join(names)}.")
    answers = ask_harness(names, context.settings.serving_interpreter)
    returns = get_lane(planned.target.lane).returned(planned.target)
    silent = [] if returns.prompt_logprobs else [target_name]
    refuse(f"Plan {plan.plan_id}", list(problems_of(answers, silent)))
    report = HarnessReport(
        provenance=Provenance.of(context.settings, plan_key(plan.plan_id)),
        measurement_id=planned.measurement_id,
        image=context.settings.image,
        tasks={str(each["name"]): tuple(each["output_types"]) for each in answers},
    )
    context.ensure_held()
    create_document(context.store, key, report)
    return _result(key, report, reused=False)


def _result(key: str, report: HarnessReport, *, reused: bool) -> StepResult:
    return StepResult(
        key=key,
        reused=reused,
        message=f"lm-evaluation-harness knows {', '.join(report.tasks)} and has the data; the "
        "target can answer.",
    )

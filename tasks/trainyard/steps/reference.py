"""Makes or takes the parity reference of a checkpoint, apart from its measurement.

For models that are too large for the machine that measures them: any machine with enough memory
that reaches the store can make the reference, or it comes as a file from one that does not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from trainyard.documents.artifacts import CheckpointManifest
from trainyard.documents.base import Provenance
from trainyard.documents.parity import Reference
from trainyard.documents.plan import Plan
from trainyard.errors import BadInput, NotFound, OutOfCapacity, Refused
from trainyard.materialize import materialize_checkpoint
from trainyard.measure.reference import ReferenceJob
from trainyard.references import PlannedReference, planned_reference
from trainyard.serving.process import base_environment
from trainyard.steps.compile import planned_target
from trainyard.steps.context import StepContext, StepResult
from trainyard.steps.measure import restore_assets
from trainyard.steps.restoring import told_to
from trainyard.store.documents import create_document, parse_document, read_document
from trainyard.store.layout import checkpoint_manifest_key, plan_key


def import_reference(
    plan: Plan, target_name: str, context: StepContext, *, file: Path | None = None
) -> StepResult:
    """Store the reference that the parity check of a target needs, or find it stored.

    Args:
        plan: its spec has a parity check, and its checkpoint is stored.
        target_name: of the plan.
        context: the surroundings.
        file: a reference that was made elsewhere. None: it is made here.

    Returns:
        The key of the reference.

    Raises:
        NotFound: the checkpoint is not stored, or there is no such file.
        BadInput: the spec asks for no parity, or the file is of another checkpoint, of other
            prompts or settings, or not whole.
        Refused: transformers cannot compute the model.
        OutOfCapacity: there is not enough memory.
        Conflict: another reference is stored already; it is kept.
    """
    planned = planned_target(plan, target_name)
    checkpoint = read_document(
        context.store, checkpoint_manifest_key(plan.spec.model, plan.revision), CheckpointManifest
    )
    wanted = planned_reference(
        plan.spec, planned.target, checkpoint.digest, restore_assets(plan, context)
    )
    if file is None and context.store.exists(wanted.key):
        return StepResult(key=wanted.key, reused=True, message="The reference is there already.")
    if file is None:
        context.progress.say("Restoring the checkpoint.")
        model_dir = materialize_checkpoint(
            context.store,
            checkpoint,
            context.work_dir / "model",
            told_to(context.progress, checkpoint.files),
        )
        file = _make(wanted, model_dir, checkpoint.digest, context)
    reference = read_reference(file, wanted, checkpoint.digest)
    provenance = Provenance.of(context.settings, plan_key(plan.plan_id), plan.checkpoint_key)
    context.ensure_held()
    new = create_document(
        context.store, wanted.key, reference.model_copy(update={"provenance": provenance})
    )
    return StepResult(
        key=wanted.key,
        reused=not new,
        message=f"The reference has answers to {len(reference.answers)} prompts.",
    )


def read_reference(file: Path, wanted: PlannedReference, checkpoint_digest: str) -> Reference:
    """Return the reference in a file, if it is the one that is needed.

    Raises: as `import_reference`.
    """
    try:
        reference = parse_document(file.read_bytes(), str(file), Reference)
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}.") from error
    if reference.checkpoint_digest != checkpoint_digest:
        raise BadInput(
            f"{file} is the reference of another checkpoint ({reference.checkpoint_digest[:12]}).",
            hint="A reference is good for exactly the files it was made from; make it anew.",
        )
    if reference.settings != wanted.settings:
        raise BadInput(
            f"{file} was made for other prompts, lengths or number formats than the plan asks for.",
            hint="Make it for this plan: `trainyard import-reference` without a file.",
        )
    whole = len(reference.answers) == len(wanted.prompts) and all(
        len(answer.positions) == len(answer.tokens) > 0 for answer in reference.answers
    )
    if not whole:
        raise BadInput(f"{file} is not whole.", hint="Make it anew.")
    return reference


def _make(
    wanted: PlannedReference, model_dir: Path, checkpoint_digest: str, context: StepContext
) -> Path:
    """Make a reference in the serving environment and return its file."""
    out = context.work_dir / "reference.json"
    out.unlink(missing_ok=True)
    job = ReferenceJob(
        model_dir=str(model_dir.absolute()),
        prompts=wanted.prompts,
        settings=wanted.settings,
        checkpoint_digest=checkpoint_digest,
    )
    python = context.settings.serving_interpreter
    command = [str(python.absolute()), "-P", "-m", "trainyard.measure.reference", str(out)]
    context.progress.say("Making the reference.")
    try:
        done = subprocess.run(
            command,
            input=job.model_dump_json(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**base_environment(), "HF_HUB_OFFLINE": "1"},
            check=False,
        )
    except OSError as error:
        raise BadInput(
            f"The serving environment's Python ({python}) cannot be run: {error.strerror}.",
            hint="Run `make setup`, or set TRAINYARD_SERVE_PYTHON to a Python that has vLLM.",
        ) from error
    said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
    if done.returncode < 0 or done.returncode == OutOfCapacity.exit_code:
        raise OutOfCapacity(
            f"There is not enough memory to make the reference: {said}",
            hint="Use a machine with more, or set gates.accuracy.parity.dtype: bfloat16.",
        )
    if done.returncode or not out.exists():
        raise Refused(f"The reference cannot be made: {said}")
    return out

"""The judge: is the candidate worse, good enough, or is it too early to say?

`judge(blocks, spec)` is a pure function of the log of blocks. It may be asked as often as one
likes, by anyone, at any moment: the error rates hold over all looks together, and the same log
gives the same verdict. It has no power to act.

* `blocks`: rows of the log -> closed blocks, in which both tracks were seen at the same time
* `history`: noise of stable's own pods, fixed before anything is exposed
* `averages`: latencies, by a score test with a frozen covariance of pods and minutes
* `counts`: errors and slow requests, by e-processes on who had the bad events
* `guards`: reasons to hold an answer back
* `drift`: slices in which the two tracks had other prompts, or one a colder cache
* `boundary`: when a score has gone too far, however often it was looked at
* `combine`: verdicts of the metrics and of the rollout

Three answers: HARM is shown, never presumed. NON_INFERIOR is shown as well; no difference seen is
not enough. Everything else, and above all missing data, is UNDECIDED.

numpy and scipy are imported at the first call, so that DAG files may import this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainyard.documents.evidence import Block, JudgeSpec, Verdict, default_metrics

__all__ = ["default_metrics", "judge", "replay"]


def judge(blocks: Sequence[Block], spec: JudgeSpec) -> Verdict:
    """Return the verdict on all blocks so far, in whatever order they come.

    HARM stays: a log in which harm was shown once remains harm, whatever follows. NON_INFERIOR
    speaks about now: every metric has its evidence at its newest closed block.
    """
    from trainyard.rollout.judge.combine import verdict

    return verdict(blocks, spec)


def replay(blocks: Sequence[Block], spec: JudgeSpec) -> Iterator[Verdict]:
    """Yield the verdict after every look, that is after every moment at which a slice ends.

    History alone (rows at or before 0) is no look.
    """
    ordered = sorted(blocks, key=lambda block: block.t)
    for index, block in enumerate(ordered):
        last = index + 1 == len(ordered) or ordered[index + 1].t > block.t
        if last and block.t > 0:
            yield judge(ordered[: index + 1], spec)

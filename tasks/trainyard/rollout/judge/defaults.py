"""The judge's fixed numbers. Changing one changes error rates or power: run the calibration.

None of them is a margin; margins and error budgets are in `MetricSpec`.
"""

from __future__ import annotations

BOUNDARY_EXPONENT = 0.4
"""D of the boundary C (I / Imax)^(D - 1/2): nearly flat, so early harm is seen early and a wrong
guess of Imax costs little."""

PROMOTE_BOUNDARY_EXPONENT = 0.3
"""As `BOUNDARY_EXPONENT`, for promotion: it waits for the blocks of the last step anyway, and where
traffic is little it needs all of them, so most of the error is kept for the end."""

BOUNDARY_START = 0.02
"""Share of Imax before which the boundary is not used."""

HORIZON_RESERVE = 1.25
"""Imax over the information that the plan yields. The boundary ends at Imax, and a little too late
is cheaper than too early."""

PROMOTE_HORIZON_RESERVE = 1.1
"""As `HORIZON_RESERVE`, for promotion, for which time beyond the plan is of less use."""

LEAST_PROMOTION_SHARE = 1 / 4
"""Promotion is planned for at least this share of the whole duration, also where the last step
begins late."""

MAX_PLANNED_BLOCKS = 400
"""A plan of more blocks is computed with longer ones; its information is nearly the same."""

HARM_BOUNDARY_SHARE = 2 / 3
"""Share of a metric's harm budget that the boundary gets; the mixture, which never ends, gets the
rest."""

PROMOTE_BOUNDARY_SHARE = 0.95
"""As `HARM_BOUNDARY_SHARE`, for promotion, which is mostly decided inside the horizon."""

MIXTURE_TIGHTNESS = 17.0
"""Variance of the mixture times Imax: sharpest at Imax for error rates near 0.1 %."""

MIN_HARM_BLOCKS = 3
"""Closed blocks that an average needs before it can be harm: fewer cannot contradict a covariance
that is too small."""

MAX_SHARE_OF_AGE = 1 / 200
"""A block is at least this share of the age of the rollout, so that the number of blocks (and the
judge's work) grows with the log of time once a rollout is long."""

LEAST_LOAD = 0.8
"""Load of a candidate's server over that of a stable one from which blocks of a step before the
last one count for promotion."""

HARM_RATIOS = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Alternatives of the harm tests on counts: so many times the boundary of the null."""

PROMOTE_RATIOS = (1 / 5, 1 / 3)
"""Alternatives of the promotion tests on counts, as `HARM_RATIOS`."""

CEILING_WEIGHT = 0.9
"""Weight of "below the ceiling" in promotion by counts; "below the ratio" has the rest."""

CLIP_EVENTS = 2
"""Bad events of one pod in one block that always count."""

CLIP_EXCESS = 8.0
"""More of them count only up to this multiple of what the null expects: a pod that loses all its
requests in flight at once is one event, not twenty."""

MAX_SHARE_PER_BLOCK = 1 / 2
"""Share of the evidence that a decision by counts needs which one block can give, however many
requests it has. As stakes are split as well, no fewer than three blocks decide."""

LEAST_REQUESTS_OF_POD = 5
"""A block tells about a pod's average only with so many of its requests."""

GONE_BLOCKS = 5
"""Blocks without a request after which the comparison of pods does not wait for a pod."""

LONGEST_WINDOW = 10
"""Blocks after which pods are compared although one of them has too few requests to tell."""

SCATTER_LEVEL = 1e-3
"""How rarely pods that are as alike as the (inflated) model says may look too different."""

SHARE_TOLERANCE = 1.25
"""Odds of a request going to the candidate may be off by this factor: requests are counted when
they end, so the slower side lags a little."""

SICK_SHARE = 0.05
"""Stable is no measure of anything once it fails more of its requests."""

MISSING_SHARE = 0.05
"""Share of the candidate's requests that may be without a first token."""

MISSING_RATIO = 2.0
"""Or so many times stable's share of them."""

GUARD_EVIDENCE = 6.9
"""ln of the evidence at which a guard holds: 1,000."""

DRIFT_SLICES = 20
"""Newest slices over which the prompts of the two tracks are compared."""

LEAST_DRIFT_SLICES = 5
"""Slices without which nothing is said about prompts."""

DRIFT_SCORE = 3.5
"""Standard errors beyond its margin at which a difference between prompts is no accident."""

"""Probes: a fixed set of prompts that both releases answer at the same moment.

* `schedule`: which prompt is next and which servers get it; pure
* `answers`: what an answer was, and which of two is wrong; pure
* `tally`: counters of everything that came of it; pure
* `windows`: when there are probes at all, and when only users' requests; pure
* `asking`: one request to one server
* `prober`: a thread of the driver's process that sends them

What the counters mean for the judge is in `rollout.slices`, with everything else that is read.
"""

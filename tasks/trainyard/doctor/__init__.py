"""`trainyard doctor`: what an environment, a node or this installation lacks.

It looks before work starts. What it writes to try its rights is removed again, if it may be.
"""

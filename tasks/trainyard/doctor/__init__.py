"""`trainyard doctor`: what an environment, a node or this installation lacks.

It looks before work starts. Every key that it writes to try its rights is removed again.
"""

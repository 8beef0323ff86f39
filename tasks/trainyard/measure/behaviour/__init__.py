"""Asks a running server what task scores do not show: does it behave, whatever the model says?

Each check has a module with two halves: `ask` sends requests and returns what came, and `judge`
makes cases of that, without any I/O. `run` makes all checks of one job.
"""

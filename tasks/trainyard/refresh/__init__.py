"""Refreshes: has a model's source a new revision, and if so, one release of it."""

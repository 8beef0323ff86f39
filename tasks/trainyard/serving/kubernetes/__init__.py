"""Servers as pods: what is applied for a release, and what becomes of it."""

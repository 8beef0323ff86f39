"""Trainyard's Airflow integration: operators, triggers, and the page in Airflow's interface."""

from __future__ import annotations

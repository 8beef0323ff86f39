"""Registers the Trainyard page. Airflow loads this file by its name; the rest is installed."""

from __future__ import annotations

from trainyard_airflow.page.plugin import TrainyardPlugin

__all__ = ["TrainyardPlugin"]

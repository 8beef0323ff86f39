"""Trainyard: the release yard for large language models on AWS Neuron.

This package is the domain. It never imports Airflow: the same code runs in a
pod, on a laptop and under an Airflow operator.
"""

from __future__ import annotations

__version__ = "0.1.0"

"""Measures a running server: accuracy, latency, and the machine that it ran on."""

"""The gates: what a measurement must show before its release is published.

Pure: documents in, verdict out. `accuracy` and `latency` say what is expected, `expectations` has
Great Expectations check it, `verdict` puts both into a `GateVerdict`.
"""

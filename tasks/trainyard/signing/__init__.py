"""Signatures: DSSE envelopes, the keys that make them, and the keys that are trusted.

securesystemslib signs and verifies; it is imported where it is used, because it brings boto3.
"""

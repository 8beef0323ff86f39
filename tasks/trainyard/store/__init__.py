"""Files, documents and channels: one protocol, one module a back end."""

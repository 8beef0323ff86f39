"""The documents that Trainyard stores: frozen pydantic models, one module a kind."""

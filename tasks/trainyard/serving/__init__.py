"""Hosts, routers and the guard: how releases are served and who may move traffic."""

"""`python -m trainyard`: the command line with the running interpreter."""

from trainyard.cli import app

app(prog_name="trainyard")

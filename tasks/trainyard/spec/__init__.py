"""The model spec and the environments: what users write, and its rules."""

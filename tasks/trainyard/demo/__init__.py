"""The demonstration: a model that trains in a minute, traffic, and releases that make the point."""

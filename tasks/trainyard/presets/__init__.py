"""Model specs to copy, each after a recipe that AWS publishes, and what has none yet.

A preset is a spec of its own, with its source in its first lines. Nothing in it was run on a Neuron
device by us: it is unproven until `trainyard doctor neuron` proved its image, instance and lane.
"""

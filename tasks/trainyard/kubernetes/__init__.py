"""The cluster: a client, names and labels, and the objects that Trainyard owns in it."""

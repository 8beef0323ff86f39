"""The node cache: files of releases on the disk of one machine, for all that runs there."""

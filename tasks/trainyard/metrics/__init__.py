"""What an installation tells Prometheus about its releases and rollouts, read from the store."""

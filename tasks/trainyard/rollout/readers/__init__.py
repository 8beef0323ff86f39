"""Readers of servers' counters: straight from the servers, or from a Prometheus.

* `families`: which series of which vLLM mean what, for both readers
* `counters`: from samples to one server's counters; what is odd is refused
* `scrape`: the servers' own pages
* `prometheus`: a server with Prometheus' HTTP API, Amazon Managed Service for Prometheus too
* `signing`: how requests to it are authenticated
* `devices`: what neuron-monitor's exporter counts
* `choice`: which reader an environment has
"""

"""The steps of a release, one module each, named like their DAG tasks."""

"""The embedded platform: PostgreSQL, Airflow, the agent and the proxy on one machine."""

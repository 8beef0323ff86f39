"""The embedded platform: PostgreSQL, Airflow's components, the agent and the proxy on one machine."""

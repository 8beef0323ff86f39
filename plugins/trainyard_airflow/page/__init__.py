"""The Trainyard page: channels, rollouts and releases in Airflow's interface. It only reads."""

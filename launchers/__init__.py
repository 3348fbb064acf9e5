"""Ways to start a job: local processes, clusters."""

"""What an operator sees: logs, metrics and traces. It knows names and numbers, nothing of runs."""

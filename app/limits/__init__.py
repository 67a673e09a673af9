"""How much each caller may use: requests by time, memory by bytes."""

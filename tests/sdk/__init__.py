"""The official SDK as a client of the served app: each version in an environment of its own, unmodified."""

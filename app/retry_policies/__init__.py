"""Retry policies: a workflow says which of its failed runs are retried by themselves, how often and when."""

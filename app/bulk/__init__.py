"""Bulk retries: jobs that retry many runs in place. Nothing below this folder knows of it."""

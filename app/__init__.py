"""The runs API: an HTTP service that runs workflows on machines and retries finished runs in place."""

__version__ = "0.2.0"  # as in pyproject.toml; a test compares them

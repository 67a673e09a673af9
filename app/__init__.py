"""The runs API: an HTTP service that runs workflows on machines and retries finished runs in place."""

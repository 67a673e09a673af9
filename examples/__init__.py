"""How to live with this service: an executor, and the life of a run that fails, is retried and succeeds."""

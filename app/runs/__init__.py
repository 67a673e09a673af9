"""The heart: the life of a run, and its retry. It knows nothing of HTTP."""

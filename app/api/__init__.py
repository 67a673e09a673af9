"""HTTP: what comes in, what goes out. Everything below knows nothing of it."""

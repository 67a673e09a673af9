"""Who calls: API keys, the scopes of a caller, and how keys are made and ended."""

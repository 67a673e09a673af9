"""The embedded stack of development and tests: a real PostgreSQL, a real OpenBao, and demo data."""

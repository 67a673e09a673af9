"""The routes: each parses, calls once, and returns. `responses=` lists every refusal."""

"""The hand-off to Temporal: one workflow for each attempt. Only with TEMPORAL_ADDRESS; docs/temporal.md says what for."""

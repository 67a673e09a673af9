"""The wire types."""

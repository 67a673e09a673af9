"""Workflows, machines and pools: what runs need of them."""

"""Workflows, machines, pools and webhook endpoints."""

"""Attacks on the promises: crashes, outages, races, leaks. Everything here drives the real service over HTTP."""

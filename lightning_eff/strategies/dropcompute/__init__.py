"""Synchronous training that bounds the compute time of a step."""

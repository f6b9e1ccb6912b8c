"""Callbacks around the precision plugins."""

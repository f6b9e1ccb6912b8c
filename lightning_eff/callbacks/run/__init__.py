"""Callbacks that watch over a run."""

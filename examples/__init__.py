"""Runnable examples: each file is a script and says in its first lines how to start it."""

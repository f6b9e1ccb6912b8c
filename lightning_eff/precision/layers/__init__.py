"""Layers whose products run in a format, and the model in which they take the place of plain ones."""

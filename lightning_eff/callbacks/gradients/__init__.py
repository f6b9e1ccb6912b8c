"""Callbacks that look at the gradients of layers' outputs, or prune them."""

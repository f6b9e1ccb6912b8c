"""Measurements of what the methods cost and gain; ``python -m benchmarks`` runs all of them with small settings.

How things are measured, and why so, is written in ``benchmarks/README.md``.
"""

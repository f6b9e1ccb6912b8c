"""Ranks of unequal speed: thresholds on compute time, its distribution, simulated delays, recorded times."""

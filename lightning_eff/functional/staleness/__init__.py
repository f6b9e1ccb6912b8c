"""Gradients that come late: schedules of delays, mitigation, stability."""

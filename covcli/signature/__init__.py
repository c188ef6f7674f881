"""Signatures: building, calibration, merging, and the monitor that uses them."""

"""Signatures: built, calibrated, merged, and put to work by a monitor."""

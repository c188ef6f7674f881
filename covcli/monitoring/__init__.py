"""The monitor at work: what files are, one file to ship, what changed between two releases."""

"""The monitor at work: verdicts on images and their drift; what files are, what changed, one to ship."""

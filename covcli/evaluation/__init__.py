"""evaluate: measure how well a signature separates untrusted images from trusted ones."""

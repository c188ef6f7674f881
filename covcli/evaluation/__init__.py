"""evaluate: how well a signature tells untrusted images from trusted ones."""

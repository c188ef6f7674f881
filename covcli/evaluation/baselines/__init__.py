"""Other detectors, run on the same images as the coverage scores."""

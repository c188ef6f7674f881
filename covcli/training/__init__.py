"""train: train a network with the ConfidenceLoss."""

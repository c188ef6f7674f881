"""train: teach a network with the ConfidenceLoss."""

"""Load networks with pretrained weights, for losses and evaluation. Nothing is downloaded: weights come from files."""

"""Load networks with pretrained weights, for losses and evaluation."""

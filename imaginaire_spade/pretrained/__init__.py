"""Networks with pretrained weights that others are measured or trained with."""

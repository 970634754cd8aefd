"""How good generated pictures are: scores, the protocol they were obtained under, and reports.

Knows pictures, data sets and networks; knows neither checkpoints nor the training loop, which calls it.
"""

"""Train a generator. To follow one iteration, read ``loop.py``, ``step.py``, ``state.py``, ``../losses.py``,
``../data/batch.py`` and ``health.py``, in this order."""

"""What things cost, as ratios to the plain dense path in the same run: ``python -m benchmarks``."""

from imaginaire_spade.processes import spin_briefly

spin_briefly()  # as the commands do, before torch is loaded

"""Training one network: the loop, the run's folder, and networks back from it."""

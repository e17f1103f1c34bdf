"""Experiments: which arm a unit has (assignment). Exposures and statistics come later."""

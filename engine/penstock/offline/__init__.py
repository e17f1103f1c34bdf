"""From history to training data (control path): point-in-time joins over tables that the user already has."""

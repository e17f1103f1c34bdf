"""Models: the folder they live in, and the runtimes that run them (control path)."""

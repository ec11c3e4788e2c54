"""A run's output folder: who owns it, what is written into it, and how the run ends, goes on and is looked into."""

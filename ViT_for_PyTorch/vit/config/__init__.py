"""What a run is told: the keys with ranges, the command line, MindFormers' YAML, and what a checkpoint is of."""

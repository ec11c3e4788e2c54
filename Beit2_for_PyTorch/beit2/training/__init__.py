"""What trains: steps, schedules, optimizers, ranks and checkpoints."""

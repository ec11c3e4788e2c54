"""The Trainer, its step and its reports; from options to batches."""

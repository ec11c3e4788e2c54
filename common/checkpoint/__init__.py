"""Parts of writing a checkpoint: in the background, and digests that say whether it is whole."""

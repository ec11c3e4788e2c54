"""Pairs of pictures and captions: where they come from, how they are read, the batches made of them."""

"""Features of a split, retrieval, zero-shot classification."""

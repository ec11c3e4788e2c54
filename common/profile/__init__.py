"""`--profile`: a trace of a few steps and a page about it."""

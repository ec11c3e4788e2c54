"""data2vec 2.0 (arXiv 2212.07525): the student sees visible tokens only, and several masks share one teacher pass."""

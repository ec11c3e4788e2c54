"""Files of samples, read whole or refused, and repairs of the libraries that read and change pictures."""

"""What a training and an evaluation are made of."""

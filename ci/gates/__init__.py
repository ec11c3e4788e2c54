"""What a change has to pass: a room for each question."""

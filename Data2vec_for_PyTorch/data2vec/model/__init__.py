"""The network: student, teacher, targets and loss."""

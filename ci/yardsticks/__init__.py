"""What a demo's numbers must beat: guessing, and methods that learn no features. Needs NumPy and Pillow only."""

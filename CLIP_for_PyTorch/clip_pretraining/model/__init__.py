"""The two families, their layers and losses; new ones, and what others load."""

"""Updates, their optimizer, what is saved and what is reported."""

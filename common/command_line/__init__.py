"""Options that several projects have: ranges of numbers, apex.amp's."""

"""The networks, as their papers describe them; no device's habits."""

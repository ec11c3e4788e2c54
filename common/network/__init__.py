"""Hosts as ranks see them: an address towards one, and which of them are gone."""

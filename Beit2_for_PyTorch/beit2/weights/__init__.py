"""Weight files: read, fetched, written in other formats."""

"""The command line: today's options, old ones, what is refused."""

"""Small real data sets, built from pinned packages of the public registries; see README.md and build.py."""

"""Do two runs have the same loss?"""

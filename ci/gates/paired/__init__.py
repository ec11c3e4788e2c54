"""Is a step slower than at another revision?"""

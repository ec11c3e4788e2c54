"""Does a training step do what was accepted?"""

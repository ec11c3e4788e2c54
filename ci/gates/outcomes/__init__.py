"""Does every project still learn?"""

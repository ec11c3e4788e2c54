"""Is a performance run slower than on earlier nights?"""

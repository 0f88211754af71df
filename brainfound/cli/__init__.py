"""The command line: one thin file per verb that parses, calls the Python API and prints.

Heavy imports stay inside the functions, so that ``brainfound --help`` answers at once.
"""

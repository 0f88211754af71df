"""What a run and its data look like to a reader: curves, contact sheets, model cards.

This room reads the files of a run folder and knows no trainer; `brainfound.train` calls it when a run ends.
"""

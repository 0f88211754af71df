"""From files to tensors: cohort → scan (`reading`) → stack (`preprocessing`) → store → batch.

`sources` turn folders into cohorts; `hooks` run external tools on scans; `splits` divide a store's subjects; `checking`
compares scans with the input contract of a model; `augmentation` changes pixels during training.
"""

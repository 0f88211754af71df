"""Splits by subject: dividing sessions into parts, and the file that records a split."""

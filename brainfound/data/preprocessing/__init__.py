"""From scans to a stack: `settings`, `foreground`, `grids`, the `stack_builder`, and whole sessions in `session`."""

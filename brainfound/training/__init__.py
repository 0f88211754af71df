"""What every training shares: the engine, the task that it trains, checkpoints, run folders, ranks and schedules."""

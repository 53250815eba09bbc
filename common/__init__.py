"""What every train script shares: the machine (runtime), checkpoints (checkpoint) and the run folder (runlog)."""

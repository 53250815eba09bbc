"""What bench.py measures, one file an experiment. May import pages and rooms; nothing but bench.py imports it."""

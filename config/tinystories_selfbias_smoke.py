# As tinystories_smoke.py, with plans that start out three times as loyal.
from pathlib import Path

exec(Path(__file__).with_name("tinystories_smoke.py").read_text())
out_dir = "out/tinystories_selfbias_smoke"
planner_self_bias = 2.5

"""What the runs of a sweep came to: a record of each, and a table with the best first."""

import json
from pathlib import Path
from typing import Any

# What the runs of an experiment are compared by and what is shown beside; whether less of the first is better.
OBJECTIVES = {
    "ghmm": (["excess_loss", "loss"], True),
    "arxiv": (["val_xe"], True),
    "apelr": (["val_nll"], True),
    "state": (["pearson_delta", "mae"], False),
}
LAST_LINES = 5  # of the console of a run that failed


def record(folder: Path, values: dict[str, str], status: str, code: int | None, seconds: float | None) -> dict:
    """A line of sweep.jsonl: what differs, what came out, and the last lines of a run that is not done.

    Args:
        values: {setting: value} of what differs between the runs.
        status: done, failed or stopped. code: of the exit. seconds: of its process, or None for what its summary says.
    """
    told = {"run": folder.name, "status": status, "exit_code": code, "seconds": seconds, "folder": str(folder)}
    told["settings"] = values
    if status == "done":
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        told["summary"] = {key: value for key, value in summary.items() if not isinstance(value, dict | list)}
        if seconds is None:
            told["seconds"] = summary.get("seconds")
    else:
        console = (folder / "console.log").read_text(encoding="utf-8", errors="replace")
        told["last_lines"] = [line for line in console.split("\n") if line.strip()][-LAST_LINES:]
    return told


def in_words(told: dict, shown: list[str]) -> str:
    """What came of a run, by its record; shown: names in its summary."""
    if told["status"] == "done":
        return ", ".join(f"{name} {number(told['summary'].get(name))}" for name in shown) or "done"
    last = told["last_lines"][-1] if told["last_lines"] else "it said nothing"
    return f"{told['status']} (exit code {told['exit_code']}): {last}"


def number(value: Any) -> str:
    """A number of a summary; what is undefined there is none."""
    return f"{value:.6g}" if isinstance(value, float | int) else "-"


def table(told: list[dict], shown: list[str], less_is_better: bool) -> list[str]:
    """The lines of a table of the runs that are done, the best by shown[0] first; then a line of each other run."""
    def rank(line: dict) -> tuple[bool, float]:
        value = line["summary"].get(shown[0]) if shown else None
        if not isinstance(value, float | int):
            return True, 0.0  # behind all that have a number
        return False, value if less_is_better else -value

    done = [line for line in told if line["status"] == "done"]
    rows = [[*told[0]["settings"], *shown, "seconds", "folder"]]
    for line in sorted(done, key=rank):
        results = [number(line["summary"].get(name)) for name in shown]
        rows.append([*line["settings"].values(), *results, number(line["seconds"]), line["folder"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows if done else []:
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
    for line in told:
        if line["status"] != "done":
            lines.append(f"{line['run']}: {in_words(line, shown)}")
    return lines

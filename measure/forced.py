"""Plans of train_apelr.py one by one: put in the place of a belief, what they write, and in words.

Dimensions: B texts, L tokens of one, K plans.
"""

import math
from collections.abc import Sequence

import torch

from measure.transcript import columns_of, fill

LONGEST = 24  # columns of a token among others, which is cut if it is longer


def fixed_belief(logits: torch.Tensor, planner_mode: str, forced_state: int | None) -> torch.Tensor | None:
    """The log belief [K] that a planner mode puts in the place of a planner's own; None in normal mode.

    logits [K]: of its prior, for the kind and the place. Raises ValueError for a mode or a plan that there is not.
    """
    logits = logits.detach()
    K = len(logits)
    if planner_mode == "normal":
        return None
    if planner_mode == "uniform_mask":
        return torch.full_like(logits, -math.log(K))
    if planner_mode == "forced_state" and forced_state in range(K):
        belief = torch.full_like(logits, -math.inf)
        belief[forced_state] = 0.0
        return belief
    raise ValueError(f"planner_mode = {planner_mode}, forced_state = {forced_state}: expected normal, "
                     f"uniform_mask, or forced_state and a plan from 0 to {K - 1}")


@torch.no_grad()
def written_nll(model, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """-log p a token [B] of what stands in texts [B, L] after their prompt, by the model with its own belief.

    Whoever wrote it: what a forced plan writes is the less likely the less the belief would have chosen that plan.
    nan where nothing stands there.
    """
    was_training = model.training
    model.eval()
    h, _ = model.read(tokens[:, :-1])
    evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]  # log p_k of each token [B, L - 1, K]
    nll = -evidence[..., 0]  # of a model without plans
    if hasattr(model, "filter"):
        nll = model.filter(evidence, model.contexts(h)).nll
    model.train(was_training)
    return nll[:, prompt_length - 1 :].float().mean(1)


def plan_table(rows: Sequence[tuple[str, str, float | None]], width: int = 100) -> str:
    """Texts side by side, a numbered row each: (label, text, nats a token) -> lines of at most `width` letters.

    Line ends are shown as arrows, so that a row stays one.
    """
    longest = max([len(label) for label, _, _ in rows] + [4])
    indent = " " * (longest + 9)
    lines = [f"{'plan':>{longest}}   nats  text"]
    for label, text, nats in rows:
        number = "" if nats is None or not math.isfinite(nats) else f"{nats:.2f}"
        shown = " \u21b5 ".join(" ".join(line.split()) for line in text.split("\n")).strip()
        shown = drawable(shown) if shown else ""
        head = f"{label:>{longest}}  {number:>5}  "
        lines += fill(shown, width, head, indent) or [head.rstrip()]
    return "\n".join(lines)


def plan_rows(report: dict) -> list[dict]:
    """What planner_eval.json says of each plan, a row a plan: its share, its loss alone, typical tokens, its text."""
    texts = {entry["plan"]: entry["text"] for entry in report.get("written", ())}
    rows = []
    for k, share in enumerate(report["usage"]):
        typical = report["typical_tokens"] or {}
        rows.append({
            "plan": k,
            "share": share_of(share),
            "loss alone": report["forced_nll"][k],
            "typical tokens": " ".join(words_of(typical.get(str(k), []))),
            "it would write": texts.get(k),
        })
    return rows


def plan_legend(
    usage: Sequence[float],
    typical: dict[str, list] | None = None,
    beside: Sequence[str] = (),
    width: int = 100,
) -> list[str]:
    """A line of at most `width` letters a plan: its share of the chunks, what stands beside it, its typical tokens.

    typical: {"0": [{"token": text}, ...]}, as planner_eval.json has them; cut at whole tokens.
    """
    number = len(str(len(usage) - 1))
    lines = []
    for k, share in enumerate(usage):
        line = f"plan {k:<{number}}  {share_of(share):>5}"
        if beside:
            line += f"  {beside[k]}"
        words = words_of(typical[str(k)]) if typical else []
        line += "  typical:" if words else ""
        for word in words:
            if columns_of(line) + 1 + columns_of(word) > width:
                break
            line += f" {word}"
        lines.append(line)
    return lines


def share_of(value: float) -> str:
    return f"{value:.0%}" if value >= 0.01 else f"{value:.1%}"


def words_of(tokens: list[dict]) -> list[str]:
    """Tokens of token_table as they can be read side by side, cut where they are long; those of blanks are left out."""
    words = [token["token"].strip(" ") for token in tokens]
    return [cut_short(drawable(word)) for word in words if word]


def cut_short(text: str) -> str:
    if columns_of(text) <= LONGEST:
        return text
    while columns_of(text) >= LONGEST:
        text = text[:-1]
    return text + "\u2026"


def drawable(text: str) -> str:
    """A token as it is drawn: line ends as an arrow, what cannot be printed as a dot."""
    shown = ""
    for character in text:
        if character.isprintable():
            shown += character
        else:
            shown += "\u21b5" if character == "\n" else "\u00b7"
    return shown or "\u00b7"

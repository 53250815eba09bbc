"""Plans of train_apelr.py put in the place of a belief, and what they write, side by side.

Dimensions: B texts, L tokens of one, K plans.
"""

import math
import textwrap
from collections.abc import Sequence

import torch


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
        head = f"{label:>{longest}}  {number:>5}  "
        lines += textwrap.wrap(shown, width, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
    return "\n".join(lines)

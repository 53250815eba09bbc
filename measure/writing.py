"""Writing by a model of train_apelr.py, token by token, with the belief that it was trained with.

prefill reads a prompt, then predict and advance go on from a state that is carried along, so that a token costs the
same anywhere in the text: the filter of the page, one token at a time (a test holds the two together).
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.log_probs import block_logits


def prefill(model, ids: torch.Tensor, head_type: torch.dtype | None = None) -> dict:
    """The state after reading ids [B, P].

    head_type: of the experts' matrix, which every token reads whole; bfloat16 halves that. Default as it is.
    """
    B, P = ids.shape
    h, memory = model.read(ids)
    weight, bias = model.experts.table()
    head = weight.t().to(head_type or weight.dtype).contiguous()  # transposed, a few rows times it are faster
    state = {"memory": memory, "h": h[:, -1], "count": P, "head": head.t(), "bias": bias}
    if not hasattr(model, "filter"):
        return state
    evidence = h.new_zeros(B, 0, len(bias))
    if P > 1:
        evidence = model.look_up(h[:, :-1], ids[:, 1:, None])[..., 0]
    # A last step without evidence: the belief before the token to come, its boundary crossed if it is due.
    beliefs = model.filter(F.pad(evidence, (0, 0, 0, 1)), model.contexts(h))
    C = model.cfg.chunk_size
    chunk = h[:, (P - 1) // C * C :]  # of the tokens read, the last chunk
    state["sum"] = chunk.to(beliefs.before.dtype).sum(1)
    return state | {"belief": beliefs.before[:, -1], "start": beliefs.start[:, -1]}


def predict(model, state: dict, planner_mode: str = "normal", forced_state: int | None = None,
            tau: float | None = None, feedback: float | None = None, horizon: int | None = None):
    """(log p of the next token [B, V], log p_k [B, K, V]) of a state; what is None is the model's."""
    x = model.experts.inputs(state["h"]).to(state["head"].dtype)
    logs = block_logits(x, state["head"], state["bias"])
    logs -= logs.amax(2, keepdim=True)
    probs = logs.exp()
    total = probs.sum(2)  # [B, K]
    logs -= total.log()[:, :, None]
    if "belief" not in state:
        return logs[:, 0], logs
    cfg = model.cfg
    tau = cfg.planner_temperature if tau is None else tau
    feedback = cfg.feedback() if feedback is None else feedback
    if planner_mode != "normal":
        feedback = 0.0
    belief = believed(model, state, planner_mode, forced_state)
    gate = model.gate(belief, tau, feedback, cfg.lookahead_horizon if horizon is None else horizon)
    mixture = ((gate.exp() / total)[:, None] @ probs)[:, 0]
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log(), logs


def believed(model, state: dict, planner_mode: str = "normal", forced_state: int | None = None) -> torch.Tensor:
    """The log belief [B, K] that a mode writes by."""
    fixed = model.fixed_belief(planner_mode, forced_state)
    return state["belief"] if fixed is None else fixed.expand_as(state["belief"])


def advance(model, state: dict, token: torch.Tensor, logs: torch.Tensor, planner_mode: str = "normal",
            forced_state: int | None = None, frozen: bool = False) -> dict:
    """The state after one more token [B]; logs [B, K, V] is what predict said of it. frozen: the belief stays."""
    cfg, last = model.cfg, state["count"]  # the index of the token being read
    h, memory = model.backbone.step(model.token_emb(token), state["memory"])
    state = state | {"memory": memory, "h": h, "count": last + 1}
    if "belief" not in state:
        return state
    before = state["sum"]
    state["sum"] = h.to(before.dtype)
    if last % cfg.chunk_size:
        state["sum"] = state["sum"] + before
    if frozen:
        return state
    state["belief"] = believed(model, state, planner_mode, forced_state)
    if planner_mode != "normal":
        return state
    if cfg.token_filtering:
        evidence = logs.gather(2, token[:, None, None].expand(-1, logs.shape[1], 1))[..., 0]
        state["belief"] = F.log_softmax(state["belief"] + evidence, 1)
    if (last + model.offset) % cfg.chunk_size == 0:
        context = model.context(model.boundary_state(h, before, state["sum"]))
        state["start"] = model.cross(state["belief"] if cfg.carry_posterior else state["start"], context)
        state["belief"] = state["start"]
    return state


def look_ahead(belief: torch.Tensor, transition: torch.Tensor, steps: int) -> torch.Tensor:
    """Probabilities [..., steps, K] of the plans 1..steps chunks ahead, by the chain alone."""
    P, forecast, forecasts = transition.softmax(1), belief.exp(), []
    with torch.autocast(belief.device.type, enabled=False):
        for _ in range(steps):
            forecast = forecast @ P
            forecasts.append(forecast)
    return torch.stack(forecasts, -2)


class Written(NamedTuple):
    tokens: torch.Tensor  # prompt and what was written [B, P + n]
    beliefs: torch.Tensor  # of the plan before each token written [B, n, K]
    forecasts: torch.Tensor  # of the plan one chunk ahead, then two ... [B, n, steps, K]


@torch.no_grad()
def generate(model, prompt: torch.Tensor, tokens: int, generator: torch.Generator, temperature: float = 1.0,
             top_k: int | None = None, top_p: float = 1.0, repetition_penalty: float = 1.0,
             no_repeat_ngram_size: int = 0, eos_id: int | None = None, forecast_steps: int = 0,
             background: bool = False, frozen: bool = False, head_type: torch.dtype | None = None,
             planner_mode: str = "normal", forced_state: int | None = None, **gate) -> Written:
    """Go on from prompts [B, P] for at most `tokens` tokens.

    Args:
        repetition_penalty: log of it is taken off the log-probability of every token already in the text.
        no_repeat_ngram_size: no n tokens twice; eos_id: a text that has it is complete, and filled up with it.
        frozen: the belief stays what the prompt made it. gate: tau, feedback, horizon of predict.
        forecast_steps: chunks ahead to forecast the plan; background: by a thread, while the next token is written.
    """
    forecaster = ThreadPoolExecutor(1) if background else None
    model.eval()
    state, mode = prefill(model, prompt, head_type), (planner_mode, forced_state)
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    seen = torch.zeros(len(prompt), len(state["bias"][0]), dtype=torch.bool, device=prompt.device)
    seen.scatter_(1, prompt, True)
    text, history, beliefs, forecasts = [prompt], prompt.tolist(), [], []
    for _ in range(tokens):
        log_p, logs = predict(model, state, *mode, **gate)
        if "belief" in state:
            beliefs.append(believed(model, state, *mode))
            if forecast_steps:
                task = beliefs[-1], model.planner_transition_logits.detach(), forecast_steps
                forecasts.append(forecaster.submit(look_ahead, *task) if forecaster else look_ahead(*task))
        if repetition_penalty != 1:
            log_p = log_p - seen * math.log(repetition_penalty)
        if temperature != 1:
            log_p = log_p / temperature
        if no_repeat_ngram_size:
            log_p = ban_ngrams(log_p, history, no_repeat_ngram_size)
        chosen = draw(log_p, top_k, top_p, generator)
        if eos_id is not None:
            chosen = torch.where(done, eos_id, chosen)
            done |= chosen == eos_id
        text.append(chosen[:, None])
        if repetition_penalty != 1:
            seen.scatter_(1, chosen[:, None], True)
        if no_repeat_ngram_size:
            for row, token in zip(history, chosen.tolist(), strict=True):
                row.append(token)
        if eos_id is not None and done.all():
            break
        state = advance(model, state, chosen, logs, *mode, frozen=frozen)
    if forecaster:
        forecasts = [task.result() for task in forecasts]
        forecaster.shutdown()
    nothing = torch.zeros(len(prompt), 0)
    return Written(torch.cat(text, 1), torch.stack(beliefs, 1) if beliefs else nothing,
                   torch.stack(forecasts, 1) if forecasts else nothing)


def ban_ngrams(log_p: torch.Tensor, history: list[list[int]], n: int) -> torch.Tensor:
    """-inf for tokens that would repeat n tokens of the text [B, V]; a row with no other choice is left as it is."""
    banned = torch.zeros_like(log_p, dtype=torch.bool)
    for i, row in enumerate(history):
        end = row[len(row) - n + 1 :]
        for j in range(len(row) - n + 1):
            if row[j : j + n - 1] == end:
                banned[i, row[j + n - 1]] = True
    banned &= ~banned.all(1, keepdim=True)
    return log_p.masked_fill(banned, -torch.inf)


def draw(log_p: torch.Tensor, top_k: int | None, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """A token [B] from log weights [B, V], of the top_k likeliest and of the fewest that have a share of top_p.

    The token that crosses top_p is kept. The draw is an exponential race: the largest p over Exp(1) noise.
    """
    if top_k and top_k < log_p.shape[1]:
        log_p = log_p.masked_fill(log_p < log_p.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = log_p.softmax(1).sort(1, descending=True)
        drop = ordered.cumsum(1) - ordered >= top_p
        drop[:, 0] = False
        log_p = log_p.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    noise = torch.empty(log_p.shape, device=generator.device).exponential_(generator=generator).to(log_p.device)
    return (log_p - noise.log_()).argmax(1)

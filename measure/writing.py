"""Writing by a model of train_apelr.py, token by token, with the belief that it was trained with.

prefill reads a prompt, then predict and advance go on from a state that is carried along, so that a token costs the
same anywhere in the text: the filter of the page, one token at a time (a test holds the two together).

Dimensions: B texts, P tokens of a prompt, n tokens written, K plans, V vocabulary. A state is a dict:
    memory   of the backbone; h [B, D], what it says after the last token; count, how many tokens it has read
    heads    of the experts, as kernels/few_rows.py keeps them; ahead: what the gate looks ahead by, once it is known
    belief   log belief about the plan of the next token [B, K]; start: at the start of its chunk; of models with plans
    sum      of h over the tokens read of the last chunk [B, D], for the mean that a boundary may be crossed by
"""

import math
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.products import float32_products
from common.telling import bar
from kernels.few_rows import Heads
from measure.forced import fixed_belief
from measure.sequences import beyond_share, first_largest

FEW_TEXTS = 8  # the backbone's products of fewer are small


def prefill(model, ids: torch.Tensor, head_type: torch.dtype | None = None) -> dict:
    """The state after reading ids [B, P].

    head_type: of the experts' matrix, which every token reads whole; bfloat16 halves that. Default as it is.
    """
    B, P = ids.shape
    h, memory = model.read(ids)
    weight, bias = model.experts.table()
    heads = Heads(weight, bias, model.experts.inputs(h[:, -1]), head_type)
    state = {"memory": memory, "h": h[:, -1], "count": P, "heads": heads, "ahead": {}}
    if not hasattr(model, "filter"):
        return state

    evidence = h.new_zeros(B, 0, len(bias))
    if P > 1:
        evidence = model.look_up(h[:, :-1], ids[:, 1:, None])[..., 0]  # [B, P - 1, K]
    # A last step without evidence: the belief before the token to come, its boundary crossed if it is due.
    evidence = F.pad(evidence, (0, 0, 0, 1))
    beliefs = model.filter(evidence, model.contexts(h))
    state["belief"] = beliefs.before[:, -1]
    state["start"] = beliefs.start[:, -1]

    C = model.cfg.chunk_size
    chunk_start = (P - 1) // C * C
    chunk = h[:, chunk_start:]  # of the tokens read, the last chunk
    state["sum"] = chunk.to(beliefs.before.dtype).sum(1)
    return state


def predict(
    model,
    state: dict,
    planner_mode: str = "normal",
    forced_state: int | None = None,
    tau: float | None = None,
    feedback: float | None = None,
    horizon: int | None = None,
    plan_temperature: float = 1.0,
):
    """(log p of the next token [B, V], log p_k [B, K, V]) of a state; what is None is the model's.

    plan_temperature divides the logits of every plan before p mixes them; log p_k stays as it is.
    """
    x = model.experts.inputs(state["h"])
    # log softmax in place; what the mixture needs, exp of the shifted logits and their sums, is kept on the way.
    logs = state["heads"].logits(x)  # [B, K, V]
    logs -= logs.amax(2, keepdim=True)
    probs = logs.exp()
    total = probs.sum(2)  # [B, K]
    logs -= total.log()[:, :, None]
    if "belief" not in state:
        return logs[:, 0], logs

    cfg = model.cfg
    if tau is None:
        tau = model.tau
    if horizon is None:
        horizon = cfg.lookahead_horizon
    if feedback is None:
        feedback = cfg.feedback()
    if planner_mode != "normal":
        feedback = 0.0  # a belief that is fixed is not looked ahead from
    belief = believed(model, state, planner_mode, forced_state)
    ahead = state["ahead"]  # shared by the states of a text, as no token changes it
    if (feedback, horizon) not in ahead:
        ahead[feedback, horizon] = model.ahead(feedback, horizon)
    gate = model.gate(belief, tau, ahead[feedback, horizon])
    if plan_temperature != 1:
        probs = (logs / plan_temperature).exp()
        total = probs.sum(2)
    # p = sum_k gate_k p_k, as one small matrix product a text
    weights = gate.exp() / total  # [B, K]
    mixture = (weights[:, None] @ probs)[:, 0]
    tiny = torch.finfo(mixture.dtype).tiny
    return mixture.clamp_min(tiny).log(), logs


def believed(model, state: dict, planner_mode: str = "normal", forced_state: int | None = None) -> torch.Tensor:
    """The log belief [B, K] that a mode writes by."""
    belief = state["belief"]
    fixed = fixed_belief(model.planner_init_logits, planner_mode, forced_state)
    if fixed is None:
        return belief
    return fixed.expand_as(belief)


def advance(
    model,
    state: dict,
    token: torch.Tensor,
    logs: torch.Tensor,
    planner_mode: str = "normal",
    forced_state: int | None = None,
    frozen: bool = False,
) -> dict:
    """The state after one more token [B]; logs [B, K, V] is what predict said of it. frozen: the belief stays."""
    cfg = model.cfg
    last = state["count"]  # the index of the token being read
    h, memory = model.backbone.step(model.token_emb(token), state["memory"])
    state = state | {"memory": memory, "h": h, "count": last + 1}
    if "belief" not in state:
        return state

    # The sum over the chunk begins anew with the chunk.
    before = state["sum"]
    state["sum"] = h.to(before.dtype)
    if last % cfg.chunk_size:
        state["sum"] = state["sum"] + before
    if frozen:
        return state
    state["belief"] = believed(model, state, planner_mode, forced_state)
    if planner_mode != "normal":
        return state

    # Bayes' rule: the belief times what each plan said of the token.
    if cfg.token_filtering:
        K = logs.shape[1]
        every_plan = token[:, None, None].expand(-1, K, 1)
        evidence = logs.gather(2, every_plan)[..., 0]  # [B, K]
        state["belief"] = F.log_softmax(state["belief"] + evidence, 1)
    # A boundary: through the transition into the next chunk.
    if (last + model.offset) % cfg.chunk_size == 0:
        context = model.context(model.boundary_state(h, before, state["sum"]))
        source = state["belief"] if cfg.carry_posterior else state["start"]
        state["start"] = model.cross(source, context)
        state["belief"] = state["start"]
    return state


def look_ahead(belief: torch.Tensor, transition: torch.Tensor, steps: int) -> torch.Tensor:
    """Probabilities [..., steps, K] of the plans 1..steps chunks ahead, by the chain alone."""
    P = transition.softmax(1)
    forecast = belief.exp()
    forecasts = []
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
def generate(
    model,
    prompt: torch.Tensor,
    tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_id: int | None = None,
    forecast_steps: int = 0,
    background: bool = False,
    frozen: bool = False,
    head_type: torch.dtype | None = None,
    planner_mode: str = "normal",
    forced_state: int | None = None,
    unread: bool = False,
    tempers_plans: bool = False,
    told: str = "",
    **gate,
) -> Written:
    """Go on from prompts [B, P] for at most `tokens` tokens.

    Args:
        repetition_penalty: log of it is taken off the log-probability of every token already in the text.
        no_repeat_ngram_size: no n tokens twice; eos_id: a text that has it is complete, and filled up with it.
        frozen: the belief stays what the prompt made it; unread: what it was before the prompt.
        tempers_plans: temperature is of every plan, and not of their mixture. gate: tau, feedback, horizon of predict.
        forecast_steps: chunks ahead to forecast the plan; background: by a thread, while the next token is written.
        temperature: 0 takes the likeliest token, the first of equals. told: what is written, for a progress bar.
    """
    B = len(prompt)
    device = prompt.device
    forecaster = ThreadPoolExecutor(1) if background else None
    model.eval()
    state = prefill(model, prompt, head_type)
    if unread and "belief" in state:
        state["belief"] = model.planner_init_logits.log_softmax(0).expand_as(state["belief"])
    if tempers_plans and temperature > 0:
        gate["plan_temperature"] = temperature
        temperature = 1.0
    mode = planner_mode, forced_state
    V = state["heads"].bias.shape[1]
    done = torch.zeros(B, dtype=torch.bool, device=device)
    seen = torch.zeros(B, V, dtype=torch.bool, device=device)
    seen.scatter_(1, prompt, True)
    history = prompt.tolist()
    text = [prompt]
    beliefs = []
    forecasts = []
    with float32_products(model.cfg.matmul_precision, device, are_small=B < FEW_TEXTS):
        for _ in bar(range(tokens), told, unit="token", active=bool(told)):
            log_p, logs = predict(model, state, *mode, **gate)
            if "belief" in state:
                belief = believed(model, state, *mode)
                beliefs.append(belief)
                if forecast_steps:
                    task = belief, model.planner_transition_logits.detach(), forecast_steps
                    forecasts.append(forecaster.submit(look_ahead, *task) if forecaster else look_ahead(*task))

            # What may come next, and how likely.
            if repetition_penalty != 1:
                log_p = log_p - seen * math.log(repetition_penalty)
            if temperature not in (0, 1):
                log_p = log_p / temperature
            if no_repeat_ngram_size:
                log_p = ban_ngrams(log_p, history, no_repeat_ngram_size)
            chosen = first_largest(log_p) if temperature == 0 else draw(log_p, top_k, top_p, generator)  # [B]
            if eos_id is not None:
                chosen = torch.where(done, eos_id, chosen)
                done |= chosen == eos_id

            # The text and what is remembered of it; on the host only where asked for, since that waits for the device.
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

    nothing = torch.zeros(B, 0)
    return Written(
        tokens=torch.cat(text, 1),
        beliefs=torch.stack(beliefs, 1) if beliefs else nothing,
        forecasts=torch.stack(forecasts, 1) if forecasts else nothing,
    )


def preview(model, corpus, rt, tokens: int) -> str:
    """A line or two of what a model in training writes, with the same random numbers every time, from its cfg's
    preview_prompt on."""
    prompt = torch.tensor([corpus.prompt_ids(model.cfg.preview_prompt)], device=rt.device)
    written = generate(model, prompt, tokens, rt.generator(7, device="cpu"), temperature=0.8, top_k=50)
    model.train()
    text = corpus.text(written.tokens[0].tolist())
    return textwrap.fill(f"  it writes: {text}", 100, subsequent_indent="    ")


def ban_ngrams(log_p: torch.Tensor, history: list[list[int]], n: int) -> torch.Tensor:
    """-inf for tokens that would repeat n tokens of the text [B, V]; a row with no other choice is left as it is."""
    banned = torch.zeros_like(log_p, dtype=torch.bool)
    for i, row in enumerate(history):
        places = len(row) - n + 1  # where n tokens of the text begin
        end = row[places:]  # the last n - 1 tokens, which the next one would complete
        for j in range(places):
            last = j + n - 1
            if row[j:last] == end:
                banned[i, row[last]] = True
    banned &= ~banned.all(1, keepdim=True)
    return log_p.masked_fill(banned, -torch.inf)


def draw(log_p: torch.Tensor, top_k: int | None, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """A token [B] from log weights [B, V], of the top_k likeliest and of the fewest that have a share of top_p.

    The token that crosses top_p is kept. The draw is an exponential race: the largest p over Exp(1) noise.
    """
    if top_k and top_k < log_p.shape[1]:
        least = log_p.topk(top_k).values[:, -1:]
        log_p = log_p.masked_fill(log_p < least, -torch.inf)
    if top_p < 1:
        log_p = log_p.masked_fill(beyond_share(log_p.softmax(1), top_p), -torch.inf)
    # Drawn where the generator is, so that a seed gives the same text on every device.
    noise = torch.empty(log_p.shape, device=generator.device)
    noise.exponential_(generator=generator)
    noise = noise.to(log_p.device)
    return (log_p - noise.log_()).argmax(1)

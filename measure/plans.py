"""What the plans of train_apelr.py are and are worth: tables, agreement with the planted truth, the verdict.

Dimensions: B windows, L tokens of one, T tokens of all, N chunks of a window, K plans, V vocabulary, H width.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

from common.errors import replacing
from common.runlog import write_json
from common.telling import bar, doing
from kernels.log_probs import block_logits, block_rows, blocks
from measure.compare_baseline import BESIDE
from measure.forced import fixed_belief, plan_rows, plan_table, written_nll  # noqa: F401 - the page takes one
from measure.plan_pictures import draw_loss, draw_plans
from measure.transcript import fill
from measure.writing import generate
from sources.outcomes import is_number

USED = 0.01  # nats a token from which a gain is called one: what another seed may bring is less
FOUND, FOUND_IN_PART = 0.9, 0.3  # of plan_nmi: on the default planted data the exact filter has 0.987

# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension; 0 log 0 = 0."""
    least = torch.finfo(log_p.dtype).min  # a number, where -inf times 0 is none
    return -(log_p.exp() * log_p.clamp_min(least)).sum(-1)


def kl_to_uniform(p: torch.Tensor) -> torch.Tensor:
    """KL(p || uniform) in nats, p [K]."""
    return math.log(len(p)) - entropy(p.clamp_min(torch.finfo(p.dtype).tiny).log())


@torch.no_grad()
def compare_experts(model, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Jensen-Shannon divergence of every pair of plans [K, K], mean probability of every token [K, V]), h [T, H]."""
    with torch.autocast(h.device.type, enabled=False):
        x = model.experts.inputs(h)
        weight, bias = model.experts.table()
        K, V = bias.shape
        tiny = torch.finfo(bias.dtype).tiny
        divergence = bias.new_zeros(K, K)
        mean = bias.new_zeros(K, V)
        size = max(8, block_rows(K, V, x.device) // 4)  # four tensors of a block's size live at once
        for rows in blocks(len(x), size):
            logits = block_logits(x[rows].to(bias.dtype), weight, bias)
            probs = logits.softmax(2)  # [R, K, V]
            mean += probs.sum(0)
            # JS(p_i, p_j) = H((p_i + p_j) / 2) - (H(p_i) + H(p_j)) / 2, plan i against all later ones
            own = entropy(probs.clamp_min(tiny).log())  # [R, K]
            for i in range(K - 1):
                later = slice(i + 1, K)
                middle = (probs[:, later] + probs[:, i : i + 1]) / 2
                middle = middle.clamp_min(tiny)
                both = own[:, later] + own[:, i : i + 1]
                apart = entropy(middle.log()) - both / 2
                divergence[i, later] += apart.sum(0)
    symmetric = divergence + divergence.t()
    return symmetric / len(x), mean / len(x)


@torch.no_grad()
def planner_report(model, corpus, starts: np.ndarray, tokens: int = 2_048) -> dict:
    """How far forced plans are apart, and the tokens of each plan, over about so many tokens of validation windows.

    Typical is what a plan predicts more than the plans do on average: the largest p_k(v) log(p_k(v) / mean p(v)).
    corpus: a Corpus. starts: of windows of the model's seq_len. One plan has no other to differ from: None.
    """
    count = max(1, tokens // model.cfg.seq_len)
    ids = windows(model, corpus, starts[:count])
    model.eval()
    h, _ = model.read(ids[:, :-1])
    h = h.flatten(0, 1).float()  # [T, H]
    divergence, mean = compare_experts(model, h)
    model.train()

    K = len(divergence)
    report = {
        "forced_state_divergence": None,
        "forced_state_divergence_all_pairs": None,
        "top_tokens": token_table(mean, mean, corpus.spell),
        "typical_tokens": None,
    }
    if K > 1:
        pairs = K * (K - 1)
        tiny = torch.finfo(mean.dtype).tiny
        ratio = mean / mean.mean(0)
        typical = mean * ratio.clamp_min(tiny).log()
        report["forced_state_divergence"] = float(divergence[0, 1])
        report["forced_state_divergence_all_pairs"] = float(divergence.sum() / pairs)
        report["typical_tokens"] = token_table(typical, mean, corpus.spell)
    return report


def write_report(
    folder: Path,
    model,
    corpus,
    starts: np.ndarray,
    metrics: dict,
    say: Callable[[str], None],
) -> dict:
    """metrics.json, planner_eval.json, plans.txt and pictures of a run, given what evaluate measured; all metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder.parent if folder.name == "analysis" else folder
    beside = run / BESIDE if model.cfg.compare_baseline else None
    draw_loss(folder, f"Loss of {model.cfg.version}, {model.cfg.backbone}", beside)
    if hasattr(model, "filter"):
        with doing("comparing what the plans predict"):
            report = planner_report(model, corpus, starts)
        numbers = {name: value for name, value in report.items() if not isinstance(value, dict)}
        numbers.pop("typical_tokens", None)
        metrics = metrics | numbers
        report["written"] = forced_texts(model, corpus)
        write_json(folder / "planner_eval.json", metrics | report)
        write_plans(folder, metrics | report)
        warn_of_idle_plans(metrics, say, model.cfg.weights())
        with doing("drawing the plans"):
            draw_plans(folder, model, corpus, starts, metrics["usage"], report["typical_tokens"])
    write_json(folder / "metrics.json", metrics)
    return metrics


def forced_texts(model, corpus) -> list[dict]:
    """What the belief and then each plan alone write on from preview_prompt: plan (None: the belief), text, nll.

    nll: as of written_nll. All begin with the same random numbers; nothing where preview_tokens is 0.
    """
    cfg = model.cfg
    if not cfg.preview_tokens:
        return []
    device = model.token_emb.weight.device
    prompt = torch.tensor([corpus.prompt_ids(cfg.preview_prompt)], device=device)
    written = []
    for plan in bar([None, *range(cfg.plans())], "writing by each plan"):
        mode = "normal" if plan is None else "forced_state"
        draws = torch.Generator().manual_seed(cfg.seed)
        tokens = generate(model, prompt, cfg.preview_tokens, draws, temperature=0.8, top_k=50, planner_mode=mode,
                          forced_state=plan).tokens  # fmt: skip
        new = tokens[0, prompt.shape[1] :].tolist()
        text = corpus.tokenizer.decode(new) if corpus.tokenizer else " ".join(map(str, new))
        written.append({"plan": plan, "text": text, "nll": float(written_nll(model, tokens, prompt.shape[1]))})
    model.train()
    return written


def write_plans(folder: Path, report: dict) -> None:
    """plans.txt: the plans for people, with what each would write."""
    lines = ["share: of chunks, by the belief at their start. alone: loss with this plan alone, nats a token", ""]
    lines.append("plan  share   alone  typical tokens")
    for row in plan_rows(report):
        head = f"{row['plan']:>4}  {row['share']:>5}  {row['loss alone']:6.3f}  "
        lines += fill(row["typical tokens"], 100, head, " " * len(head)) or [head.rstrip()]
    if report["written"]:
        rows = []
        for entry in report["written"]:
            label = "belief" if entry["plan"] is None else str(entry["plan"])
            rows.append((label, entry["text"], entry["nll"]))
        lines += ["", "What each plan alone would write, and the belief over them. nats: a token, by that belief"]
        lines += ["", plan_table(rows)]
    with replacing(folder / "plans.txt") as fresh:
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def windows(model, corpus, starts: np.ndarray) -> torch.Tensor:
    """Validation windows [B, L + 1] where the model is."""
    device = model.token_emb.weight.device
    return corpus.windows("val", starts, model.cfg.seq_len, device)


def token_table(
    score: torch.Tensor,
    mean: torch.Tensor,
    spell: Callable[[int], str],
    top: int = 12,
) -> dict[str, list]:
    """The tokens of the highest score [K, V] of every plan, with their mean probability [K, V]."""
    table = {}
    for k, row in enumerate(score):
        count = min(top, len(row))
        ids = row.topk(count).indices.tolist()
        tokens = []
        for i in ids:
            tokens.append({"token": spell(i), "id": i, "probability": float(mean[k, i])})
        table[str(k)] = tokens
    return table


def warn_of_idle_plans(metrics: dict, say: Callable[[str], None], terms: Collection[str] = ()) -> None:
    """Say so where plans differ in what they predict, and the belief about them is worth nothing.

    terms: auxiliary terms of the run; those that reward plans for being different are named as what to lower.
    """
    divergence = metrics["forced_state_divergence_all_pairs"]
    gain = metrics["plan_gain"]
    if not is_number(divergence) or not is_number(gain):
        return
    if gain < USED and divergence > 0.1:
        line = (
            f"warning: the plans differ (divergence {divergence:.2f}) but one of them does as well alone "
            f"(plan_gain {gain:.4f})"
        )
        if "plan_js_div" in terms:
            line += ": lower loss_weights.plan_js_div"
        if "plan_mi" in terms:
            line += ": lower plan_mi_weight"
        say(line)


def perplexity(nll: float) -> float | None:
    """exp(nll) of nats a token; None beyond what a float holds."""
    return math.exp(nll) if nll < 700 else None


def window_numbers(model, h: torch.Tensor, evidence: torch.Tensor) -> list[torch.Tensor]:
    """What an evaluation keeps of each of B windows: nll [B]; of a planner what its belief is and is worth, too.

    h [B, L, D]: states of the backbone. evidence [B, L, K]: log p_k of each token.
    """
    if not hasattr(model, "filter"):
        return [-evidence.mean((1, 2))]
    beliefs = model.filter(evidence, model.contexts(h))
    # masked: nll under the uniform belief, -log mean_k p_{t,k}(y_t), [B]. forced: nll of each plan alone [B, K].
    masked = math.log(evidence.shape[2]) - torch.logsumexp(evidence, 2).mean(1)
    forced = -evidence.mean(1)
    return [
        beliefs.nll.mean(1),
        masked,
        forced,
        model.counted(beliefs.state, h.shape[1]),
        beliefs.end.argmax(2),  # the likeliest plan at each chunk's end
    ]


def plan_worth(nll: float, masked: torch.Tensor, forced: torch.Tensor) -> dict:
    """What the same experts lose without the belief: mixed evenly, or the best of them alone.

    masked [B], forced [B, K]: as of window_numbers. One plan can be neither masked nor exchanged: None.
    """
    alone = forced.mean(0).tolist()
    worth = {"planner_mask_delta_loss": None, "forced_nll": alone, "plan_gain": None}
    if len(alone) > 1:
        worth["planner_mask_delta_loss"] = float(masked.mean()) - nll
        worth["plan_gain"] = min(alone) - nll
    return worth


@torch.no_grad()
def usage_metrics(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often the likeliest plan stays, and how evenly plans are used (1: all alike), given log beliefs [B, N, K].

    Of one plan there is neither, and of one chunk no staying: what is not defined is left out.
    """
    usage = state.exp().mean((0, 1))  # [K]
    chosen = state.argmax(2)  # [B, N]
    _, N, K = state.shape
    metrics = {}
    if K > 1 and N > 1:
        same = chosen[:, 1:] == chosen[:, :-1]
        metrics["state_persistence"] = same.to(usage).mean()
    if K > 1:
        metrics["expert_utilization"] = entropy(usage.log()) / math.log(K)
    return metrics


def plan_metrics(
    state: torch.Tensor,
    end: torch.Tensor,
    transition: torch.Tensor,
    true: np.ndarray | None,
) -> dict:
    """How plans are used and follow one another, and where the true ones [B, N] are known, whether they are recovered.

    state: log beliefs that chunks work with [B, N, K]. end: likeliest plan at their ends [B, N]. transition: logits.
    What is not defined, such as the transitions of one plan, is None.
    """
    names = ("state_persistence", "expert_utilization", "transition_mean_diagonal", "transition_row_entropy")
    metrics = dict.fromkeys(names)
    for name, value in usage_metrics(state).items():
        metrics[name] = float(value)
    metrics["usage"] = state.exp().mean((0, 1)).tolist()
    K = len(transition)
    if K > 1:
        P = transition.detach().cpu().double().softmax(1)  # [K, K]
        metrics["transition_mean_diagonal"] = float(P.diagonal().mean())
        metrics["transition_row_entropy"] = float(entropy(P.log()).mean())
    if true is not None:
        metrics["plan_nmi"] = None
        true = true[:, : end.shape[1]]
        if K > 1 and np.ptp(true):  # there is something to find, and something to find it by
            ours = end.long().numpy()
            metrics["plan_nmi"] = normalised_mutual_information(ours.ravel(), true.ravel())
    return metrics


def verdict(metrics: dict) -> str:
    """The run in two or three sentences: its loss, whether its plan is found and used, whether it beats a baseline.

    A figure that is not there or not defined is left out.
    """
    loss = f"loss {metrics['val_nll']:.4f} nats a token"
    if is_number(metrics.get("val_ppl")):
        loss += f" (perplexity {metrics['val_ppl']:.2f})"
    if is_number(metrics.get("oracle_nll")):
        excess = metrics.get("excess_over_oracle")
        if is_number(excess):
            loss += f" is {abs(excess):.2%} {'above' if excess >= 0 else 'BELOW'} the exact optimum"
        else:
            loss += ", exact optimum"
        loss += f" {metrics['oracle_nll']:.4f}"
    return ". ".join([loss, *judge_plan(metrics), *judge_baseline(metrics)])


def judge_plan(metrics: dict) -> list[str]:
    """Whether the plan is found, where that is known, and is worth something, in a sentence; none where none can tell.

    It is used if the loss rises by USED both where the belief is made uniform and where the best plan writes alone: an
    even mixture that does as well needs no belief, and one plan that does as well needs no others.
    """
    nmi = metrics.get("plan_nmi")
    parts = []
    if is_number(nmi):
        found = "found" if nmi >= FOUND else "found in part" if nmi >= FOUND_IN_PART else "NOT found"
        parts.append(f"{found} (plan_nmi {nmi:.3f} of 1)")
    ways = {  # what the loss is of, and who does as well then
        "planner_mask_delta_loss": ("without the belief", "an even mixture of the plans"),
        "plan_gain": ("with the best plan alone", "one plan alone"),
    }
    known = {name: metrics[name] for name in ways if is_number(metrics.get(name))}
    idle = {name: value for name, value in known.items() if value < USED}
    reasons = []
    if idle:
        for name, value in idle.items():
            does = "does as well" if value > -USED else "does better"
            reasons.append(f"{ways[name][1]} {does} ({name} {value:+.4f})")
        parts.append(f"not used: {' and '.join(reasons)}")
    elif known:
        for name, value in known.items():
            reasons.append(f"by {value:.4f} {ways[name][0]} ({name})")
        parts.append(f"used: the loss rises {' and '.join(reasons)}")
    return ["The plan is " + " and ".join(parts)] if parts else []


def judge_baseline(metrics: dict) -> list[str]:
    """Whether the run beats the baseline that was trained beside it, in words; nothing where there is none."""
    rival = metrics.get("baseline_nll")
    if not is_number(rival) or not is_number(metrics["val_nll"]):
        return []
    gain = rival - metrics["val_nll"]
    judged = "DOES NOT BEAT"
    if gain > 0:
        judged = "beats" if gain >= USED else "is hardly better than"
    line = f"It {judged} the baseline of equal size: baseline_nll {rival:.4f} ({gain:+.4f})"
    if is_number(metrics.get("baseline_ppl")):
        line += f", perplexity {metrics['baseline_ppl']:.2f}"
    if is_number(metrics.get("baseline_parameters")) and is_number(metrics.get("parameters")):
        line += f", {metrics['baseline_parameters']:,} parameters (here {metrics['parameters']:,})"
    return [line]


def without_effect(cfg, demo: dict[str, float]) -> list[str]:
    """Settings that a run was given and that nothing in it looks at.

    demo: what loss_weights is where it is not given.
    """
    return unused_weights(cfg, demo) + unused_choices(cfg)


def unused_weights(cfg, demo: dict[str, float]) -> list[str]:
    """Those of weights that the version does not look at."""
    names = ["chunk_bow_weight", "plan_mi_weight", "chunk_post_kl_weight"]  # of version 1
    of_both = {"entropy_reg_weight": "boundary_entropy", "usage_balance_weight": "usage_balance"}
    if cfg.version == "v1_filtered_mixture":
        names = []
    if cfg.version == "baseline":
        names += of_both
    unused = [name for name in names if getattr(cfg, name)]
    if cfg.version != "v2_planner_required":
        return unused + ["loss_weights"] * (cfg.loss_weights != demo)
    # Of version 2 loss_weights goes before a weight of its own.
    for name, term in of_both.items():
        weight = getattr(cfg, name)
        if weight and cfg.loss_weights.get(term, weight) != weight:
            unused.append(name)
    return unused


OF_PLANNERS = (
    "num_plan_states",
    "chunk_size",
    "boundary",
    "planner_context_scale",
    "planner_self_bias",
    "planner_temperature",
    "plan_temperature_start",
    "plan_temperature_end",
    "token_filtering",
    "carry_posterior",
    "lookahead_feedback_scale",
)


def unused_choices(cfg) -> list[str]:
    """Those that are not the default, and of another version, backbone or choice."""
    # Files of the source have settings of everything; a baseline beside a planner has those of the planner.
    if cfg.compat or Path(cfg.out_dir).name == BESIDE:
        return []
    weights = cfg.weights(cfg.max_steps)
    is_attentive = cfg.backbone != "gru"
    samples = cfg.plan_commitment == "gumbel_st"
    is_auto = cfg.batch_size == "auto"
    looked_at = dict.fromkeys(OF_PLANNERS, cfg.version != "baseline") | {
        "n_heads": is_attentive,
        "d_ff": is_attentive,
        "max_seq_len": cfg.backbone == "transformer_lm",
        "num_experts": cfg.version == "v2_planner_required",
        "expert_rank": cfg.experts == "lowrank",
        "fusion_dim": cfg.version == "v1_filtered_mixture",
        "lookahead_horizon": cfg.version != "baseline" and cfg.feedback() > 0,
        "chunk_bow_warmup_steps": "chunk_bow" in weights,
        "rep_window": "rep_unlikelihood" in weights,
        "rep_include_current": "rep_unlikelihood" in weights,
        "aux_token_fraction": bool({"plan_mi", "plan_js_div"} & set(weights)),
        "future_horizon_chunks": "future_contrastive" in weights,
        "commitment_warmup_steps": samples,
        "commitment_ramp_steps": samples,
        "commitment_max_hard_fraction": samples,
        "cpu_batch_size": is_auto,
        "batch_size_min": is_auto,
        "batch_size_cap": is_auto,
        "batch_size_safety": is_auto,
        "preview_prompt": cfg.preview_tokens > 0,
        "min_lr": cfg.schedule == "cosine" or cfg.min_lr == 0.1 * cfg.lr,
    }
    default = type(cfg)()
    return [name for name, is_used in looked_at.items() if not is_used and getattr(cfg, name) != getattr(default, name)]


def size_of(model: torch.nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(model, corpus, batch_size: int, demo: dict[str, float]) -> str:
    """A run in a few lines, before it trains; demo: as of unused_weights."""
    cfg = model.cfg
    terms = ", ".join(f"{weight:g} {name}" for name, weight in cfg.weights(cfg.max_steps).items())
    lines = [
        f"{cfg.version}, {cfg.backbone} | {size_of(model):,} parameters | auxiliary terms: {terms or 'none'}",
        f"{len(corpus.train):,} training tokens of {corpus.name}, vocabulary {corpus.vocab_size:,} | "
        f"{batch_size} x {cfg.seq_len} tokens a step",
    ]
    unused = without_effect(cfg, demo)
    if unused:
        lines.append(f"  note: without effect on this run ({cfg.version}, {cfg.backbone}): {', '.join(unused)}")
    if corpus.chunk_size not in (0, cfg.chunk_size) and hasattr(model, "filter"):
        lines.append(
            f"  note: chunk_size = {cfg.chunk_size}, and the planted plans change every {corpus.chunk_size} tokens: "
            "plan_nmi is not measured"
        )
    return "\n".join(lines)


def evaluation_line(step: int, metrics: dict) -> str:
    """What an evaluation during training says, the names of metrics.jsonl shortened."""
    names = {
        "val_nll": "val_nll",
        "val_ppl": "ppl",
        "plan_gain": "gain",
        "planner_mask_delta_loss": "mask",
        "oracle_nll": "optimum",
        "plan_nmi": "nmi",
    }
    shown = []
    for name, short in names.items():
        if metrics.get(name) is not None:
            digits = 2 if name == "val_ppl" else 4
            shown.append(f"{short} {metrics[name]:.{digits}f}")
    return " | ".join([f"step {step:>6} eval", *shown])


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float | None:
    """I(a; b) / sqrt(H(a) H(b)) of two labellings, in [0, 1].

    Where one of them is constant the other tells nothing of it: 0, the limit. Where both are, nothing is asked: None.
    """
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    table /= len(a)  # joint probabilities
    labels = [np.count_nonzero(table.any(axis)) for axis in (0, 1)]
    if max(labels) == 1:
        return None
    if min(labels) == 1:
        return 0.0

    def H(p: np.ndarray) -> float:
        p_used = p[p > 0]
        return -(p_used * np.log(p_used)).sum()

    H_a = H(table.sum(1))
    H_b = H(table.sum(0))
    return float((H_a + H_b - H(table)) / math.sqrt(H_a * H_b))

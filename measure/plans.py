"""What the plans of train_apelr.py are: tables, agreement with the planted truth, pictures.

Dimensions: B windows, L tokens of one, T tokens of all, N chunks of a window, K plans, V vocabulary, H width.
"""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from common.runlog import read_metrics, write_json
from kernels.log_probs import block_logits, block_rows, blocks
from measure.compare_baseline import BESIDE
from measure.figures import figure

USED = 0.01  # nats a token from which a gain is called one: what another seed may bring is less

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
    """metrics.json, planner_eval.json and pictures of a run, given what evaluate measured; all metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder.parent if folder.name == "analysis" else folder
    beside = run / BESIDE if model.cfg.compare_baseline else None
    draw_loss(folder, f"{model.cfg.version}, {model.cfg.backbone}", beside)
    if hasattr(model, "filter"):
        report = planner_report(model, corpus, starts)
        numbers = {name: value for name, value in report.items() if not isinstance(value, dict)}
        numbers.pop("typical_tokens", None)
        metrics = metrics | numbers
        write_json(folder / "planner_eval.json", metrics | report)
        warn_of_idle_plans(metrics, say, model.cfg.weights())
        draw_plans(folder, model, corpus, starts, metrics["usage"])
    write_json(folder / "metrics.json", metrics)
    return metrics


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


def is_number(value: object) -> bool:
    """Whether a figure is there and defined: neither None nor nan nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


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
    """The run in one line: its loss, whether its plan is used, and whether it beats a baseline of equal size.

    A figure that is not there or not defined is left out.
    """
    parts = [f"validation nll {metrics['val_nll']:.4f} nats a token"]
    if is_number(metrics.get("val_ppl")):
        parts[0] += f", perplexity {metrics['val_ppl']:.2f}"
    if is_number(metrics.get("oracle_nll")):
        optimum = f"exact optimum {metrics['oracle_nll']:.4f}"
        excess = metrics.get("excess_over_oracle")
        parts.append(f"{optimum} ({100 * excess:+.2f}%)" if is_number(excess) else optimum)
    if is_number(metrics.get("plan_nmi")):
        parts.append(f"nmi of plans and true plans {metrics['plan_nmi']:.3f}")
    parts += judge_plan(metrics)
    parts += judge_baseline(metrics)
    return "; ".join(parts)


def judge_plan(metrics: dict) -> list[str]:
    """Whether the belief is worth something, in words; nothing where that cannot be told.

    It is used if the loss rises by USED both where the belief is made uniform and where the best plan writes alone: an
    even mixture that does as well needs no belief, and one plan that does as well needs no others.
    """
    gain = metrics.get("plan_gain")
    masked = metrics.get("planner_mask_delta_loss")
    worth = {"plan_gain": gain, "planner_mask_delta_loss": masked}
    known = {name: value for name, value in worth.items() if is_number(value)}
    if not known:
        return []
    figures = ", ".join(f"{name} {value:+.4f}" for name, value in known.items())
    if min(known.values()) < USED:
        return [f"the plan is not used: {figures}"]
    return [f"the plan is used: {figures}"]


def judge_baseline(metrics: dict) -> list[str]:
    """Whether the run beats the baseline that was trained beside it, in words; nothing where there is none."""
    rival = metrics.get("baseline_nll")
    if not is_number(rival) or not is_number(metrics["val_nll"]):
        return []
    gain = rival - metrics["val_nll"]
    judged = "DOES NOT BEAT"
    if gain > 0:
        judged = "beats" if gain >= USED else "is hardly better than"
    line = f"it {judged} the baseline of equal size: baseline_nll {rival:.4f} ({gain:+.4f})"
    if is_number(metrics.get("baseline_ppl")):
        line += f", perplexity {metrics['baseline_ppl']:.2f}"
    if is_number(metrics.get("baseline_parameters")) and is_number(metrics.get("parameters")):
        line += f", {metrics['baseline_parameters']:,} parameters (here {metrics['parameters']:,})"
    return [line]


def unused_weights(cfg, demo: dict[str, float]) -> list[str]:
    """Settings of weights that a run was given and that its version does not look at.

    demo: what loss_weights is where it is not given.
    """
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


def size_of(model: torch.nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(model, corpus, batch_size: int, demo: dict[str, float]) -> str:
    """A run in a few words, before it trains; demo: as of unused_weights."""
    cfg = model.cfg
    text = (
        f"{cfg.version}, {cfg.backbone} | {size_of(model):,} parameters | vocabulary {corpus.vocab_size:,} | "
        f"{len(corpus.train):,} training tokens of {corpus.name} | {batch_size} x {cfg.seq_len} tokens a step | "
        f"auxiliary terms: {cfg.weights()}"
    )
    unused = unused_weights(cfg, demo)
    if unused:
        text += f"\n  note: without effect on {cfg.version}: {', '.join(unused)}"
    if corpus.chunk_size not in (0, cfg.chunk_size) and hasattr(model, "filter"):
        text += (
            f"\n  note: chunk_size = {cfg.chunk_size}, and the planted plans change every {corpus.chunk_size} tokens: "
            "plan_nmi is not measured"
        )
    return text


def evaluation_line(step: int, metrics: dict) -> str:
    """What an evaluation during training says."""
    names = ("val_nll", "val_ppl", "plan_gain", "planner_mask_delta_loss", "oracle_nll", "plan_nmi")
    shown = [f"{name} {metrics[name]:.4f}" for name in names if metrics.get(name) is not None]
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


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def draw_loss(folder: Path, title: str, beside: Path | None = None) -> None:
    """Loss over training, from metrics.jsonl of the run and of a baseline beside it, and the exact optimum if known."""
    own = read_metrics(folder)
    rival = read_metrics(beside) if beside else []
    curves = (
        (own, "train", "nll", "training", "-", 1.5),
        (own, "eval", "val_nll", "validation", "-", 1.5),
        (rival, "eval", "val_nll", "validation of the baseline of equal size", "-", 1.0),
        (own, "eval", "oracle_nll", "exact optimum on the validation windows", "k--", 0.8),
    )
    with figure(folder, "loss") as axes:
        for history, split, key, label, style, width in curves:
            records = [r for r in history if r["split"] == split and is_number(r.get(key))]
            if records:
                steps = [r["step"] for r in records]
                values = [r[key] for r in records]
                axes.plot(steps, values, style, marker=".", label=label, linewidth=width)  # one point shows too
        axes.set(xlabel="step", ylabel="nats a token", title=title)
        if axes.lines:  # a checkpoint of the source has no history here
            axes.legend(fontsize=8)


@torch.no_grad()
def draw_plans(
    folder: Path,
    model,
    corpus,
    starts: np.ndarray,
    usage: Sequence[float],
    most: int = 96,
) -> None:
    """Usage of the plans, transitions, and the belief over the first `most` tokens of the first validation window."""
    draw_usage(folder, usage)
    P = model.planner_transition_logits.softmax(1)
    draw_transition(folder, P.float().cpu().numpy())

    tokens = windows(model, corpus, starts[:1])  # [1, L + 1]
    model.eval()
    h, _ = model.read(tokens[:, :-1])
    evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]  # log p_k of each token [1, L, K]
    beliefs = model.filter(evidence, model.contexts(h))
    model.train()
    # Bayes' rule: the belief after a token is what it was before times what each plan said of the token.
    after = (beliefs.before + evidence).softmax(2)
    shown = after[0, :most].float().cpu().numpy()

    C = model.cfg.chunk_size
    begins = [t for t in range(1, len(shown)) if (t + model.offset) % C == 0]
    text = tokens[0, 1 : len(shown) + 1].tolist()
    labels = [corpus.spell(token) for token in text]
    title = "belief after each token of a validation passage (blue: a chunk begins)"
    true = corpus.true_plans(starts[:1], C)
    true_plans = ()
    if true is not None:
        true_plans = true[0]
        title += "; which of our plans stands for which true one is arbitrary"
    draw_beliefs(folder, "belief", shown, labels, begins, title, true_plans)


def draw_usage(folder: Path, usage: Sequence[float]) -> None:
    """Mean beliefs at chunk starts over training, or the last ones [K] where there was one evaluation."""
    K = len(usage)
    records = [r for r in read_metrics(folder) if r["split"] == "eval" and "usage" in r]
    colours = [f"C{k % 10}" for k in range(K)]
    with figure(folder, "plan_usage") as axes:
        axes.set(ylabel="mean belief at chunk starts", title="usage of the plans")
        if len(records) > 1:
            steps = [r["step"] for r in records]
            shares = np.array([r["usage"] for r in records])  # [evaluations, K]
            names = [f"plan {k}" for k in range(K)]
            axes.stackplot(steps, shares.T, colors=colours, labels=names, alpha=0.85)
            axes.set(xlabel="step", ylim=(0, 1))
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            axes.bar(range(K), usage, color=colours)
            axes.set(xlabel="plan", xticks=range(K))


def draw_transition(folder: Path, P: np.ndarray) -> None:
    """The transition matrix [K, K], with numbers where there is room."""
    K = len(P)
    with figure(folder, "transition_matrix", 5.5, 4.5) as axes:
        image = axes.imshow(P, vmin=0, vmax=1, cmap="magma_r")
        axes.figure.colorbar(image, ax=axes, label="probability")
        if K <= 16:
            for i, j in np.ndindex(P.shape):
                colour = "white" if P[i, j] > 0.45 else "black"  # on a dark square or a bright one
                number = f"{P[i, j]:.2f}"
                axes.text(j, i, number, ha="center", va="center", fontsize=7, color=colour)
        axes.set(
            xlabel="to plan",
            ylabel="from plan",
            xticks=range(K),
            yticks=range(K),
            title="transition matrix, without what the text adds",
        )


def draw_beliefs(
    folder: Path,
    name: str,
    beliefs: np.ndarray,
    labels: list[str],
    boundaries: list[int],
    title: str,
    true: Sequence[int] = (),
) -> None:
    """Beliefs [L, K] as a heat map over the text.

    Args:
        labels: the tokens [L]. boundaries: where a chunk begins. true: plans of the chunks, where they are known.
    """
    L, K = beliefs.shape
    width = max(7.0, 0.13 * len(labels))
    height = 1.7 + 0.18 * K
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not: drawn as boxes
        with figure(folder, name, width, height) as axes:
            image = axes.imshow(
                beliefs.T,
                aspect="auto",
                vmin=0,
                vmax=1,
                cmap="magma_r",
                interpolation="nearest",
            )
            axes.figure.colorbar(image, ax=axes, label="belief", pad=0.01)
            for column in boundaries:
                axes.axvline(column - 0.5, color="tab:blue", linewidth=0.8)
            # The name of a plan is as wide as 6 tokens: a chunk that begins nearer to the end goes without.
            named = [0, *(column for column in boundaries if column + 6 < L)]
            for column, plan in zip(named, true, strict=False):
                axes.text(column, -0.55, f"true plan {plan}", fontsize=7, va="bottom")
            ticks = [drawable(text[:12]) for text in labels]
            axes.set_xticks(range(len(labels)), ticks, rotation=90, fontsize=6)
            axes.set(yticks=range(K), ylabel="plan")
            axes.set_title(title, fontsize=9, pad=14 if len(true) else 6)


def drawable(text: str) -> str:
    """A token as a label: line ends as an arrow, what cannot be printed as a dot, dollars as dollars."""
    shown = ""
    for character in text:
        if character.isprintable():
            shown += character
        elif character == "\n":
            shown += "\u21b5"
        else:
            shown += "\u00b7"
    shown = shown.replace("$", "\\$")  # a dollar alone would begin a formula
    return shown or "\u00b7"

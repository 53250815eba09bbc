"""What the plans of train_apelr.py are: tables, agreement with the planted truth, pictures."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from common.runlog import read_metrics, write_json
from kernels.log_probs import block_logits, block_rows, blocks
from measure.figures import figure

# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension; 0 log 0 = 0."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


@torch.no_grad()
def compare_experts(model, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Jensen-Shannon divergence of every pair of plans [K, K], mean probability of every token [K, V]), h [T, H]."""
    with torch.autocast(h.device.type, enabled=False):
        x, (weight, bias) = model.experts.inputs(h), model.experts.table()
        K, V = bias.shape
        divergence, mean, tiny = bias.new_zeros(K, K), bias.new_zeros(K, V), torch.finfo(bias.dtype).tiny
        for rows in blocks(len(x), max(8, block_rows(K, V, x.device) // 4)):
            probs = block_logits(x[rows].to(bias.dtype), weight, bias).softmax(2)
            mean += probs.sum(0)
            own = entropy(probs.clamp_min(tiny).log())  # [R, K]
            for i in range(K - 1):
                middle = ((probs[:, i + 1 :] + probs[:, i : i + 1]) / 2).clamp_min(tiny)
                apart = entropy(middle.log()) - (own[:, i + 1 :] + own[:, i : i + 1]) / 2
                divergence[i, i + 1 :] += apart.sum(0)
    return (divergence + divergence.t()) / len(x), mean / len(x)


@torch.no_grad()
def planner_report(model, corpus, starts: np.ndarray, tokens: int = 2_048) -> dict:
    """How far forced plans are apart, and the tokens of each plan, over about so many tokens of validation windows.

    Typical is what a plan predicts more than the plans do on average: the largest p_k(v) log(p_k(v) / mean p(v)).
    corpus: a Corpus. starts: of windows of the model's seq_len.
    """
    ids = windows(model, corpus, starts[: max(1, tokens // model.cfg.seq_len)])
    model.eval()
    h = model.read(ids[:, :-1])[0].flatten(0, 1).float()
    divergence, mean = compare_experts(model, h)
    model.train()
    K = len(divergence)
    typical = mean * (mean / mean.mean(0)).clamp_min(torch.finfo(mean.dtype).tiny).log()
    return {"forced_state_divergence": float(divergence[0, min(1, K - 1)]),
            "forced_state_divergence_all_pairs": float(divergence.sum() / max(1, K * (K - 1))),
            "top_tokens": token_table(mean, mean, corpus.spell),
            "typical_tokens": token_table(typical, mean, corpus.spell)}


def write_report(folder: Path, model, corpus, starts: np.ndarray, metrics: dict, say: Callable[[str], None]) -> dict:
    """metrics.json, planner_eval.json and pictures of a run, given what evaluate measured; all metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_loss(folder, f"{model.cfg.version}, {model.cfg.backbone}")
    if hasattr(model, "filter"):
        report = planner_report(model, corpus, starts)
        metrics = metrics | {name: value for name, value in report.items() if isinstance(value, float)}
        write_json(folder / "planner_eval.json", metrics | report)
        warn_of_idle_plans(metrics, say)
        draw_plans(folder, model, corpus, starts, metrics["usage"])
    write_json(folder / "metrics.json", metrics)
    return metrics


def windows(model, corpus, starts: np.ndarray) -> torch.Tensor:
    """Validation windows [B, L + 1] where the model is."""
    return corpus.windows("val", starts, model.cfg.seq_len, model.token_emb.weight.device)


def token_table(score: torch.Tensor, mean: torch.Tensor, spell: Callable[[int], str], top: int = 12) -> dict[str, list]:
    """The tokens of the highest score [K, V] of every plan, with their mean probability."""
    table = {}
    for k, row in enumerate(score):
        ids = row.topk(min(top, len(row))).indices.tolist()
        table[str(k)] = [{"token": spell(i), "id": i, "probability": float(mean[k, i])} for i in ids]
    return table


def warn_of_idle_plans(metrics: dict, say: Callable[[str], None]) -> None:
    divergence = metrics["forced_state_divergence_all_pairs"]
    if metrics["plan_gain"] < 0.01 and divergence > 0.1:
        say(f"warning: the plans differ (divergence {divergence:.2f}) but one of them does as well alone (plan_gain "
            f"{metrics['plan_gain']:.4f}): lower loss_weights.plan_js_div")


@torch.no_grad()
def usage_metrics(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often the likeliest plan stays, and how evenly plans are used (1: all alike), given log beliefs [B, N, K]."""
    usage, chosen = state.exp().mean((0, 1)), state.argmax(2)
    same = (chosen[:, 1:] == chosen[:, :-1]).to(usage)
    return {"state_persistence": same.mean() if same.numel() else torch.ones_like(usage[0]),
            "expert_utilization": entropy(usage.log()) / math.log(max(2, len(usage)))}


def plan_metrics(state: torch.Tensor, end: torch.Tensor, transition: torch.Tensor, true: np.ndarray | None) -> dict:
    """How plans are used and follow one another, and where the true ones [B, N] are known, whether they are found.

    state: log beliefs that chunks work with [B, N, K]. end: likeliest plan at their ends [B, N]. transition: logits.
    """
    P = transition.detach().cpu().double().softmax(1)
    metrics = {name: float(value) for name, value in usage_metrics(state).items()} | {
        "usage": state.exp().mean((0, 1)).tolist(),
        "transition_mean_diagonal": float(P.diagonal().mean()),
        "transition_row_entropy": float(entropy(P.log()).mean()),
    }
    if true is not None:
        true = true[:, : end.shape[1]]
        metrics["plan_nmi"] = normalised_mutual_information(end.long().numpy().ravel(), true.ravel())
    return metrics


def verdict(metrics: dict, folder: Path) -> str:
    """The run in one line."""
    line = f"done: validation nll {metrics['val_nll']:.4f} nats a token, perplexity {metrics['val_ppl']:.2f}"
    if "oracle_nll" in metrics:
        line += f"; exact optimum {metrics['oracle_nll']:.4f} ({100 * metrics['excess_over_oracle']:+.2f}%)"
    if "plan_nmi" in metrics:
        line += f"; plan recovered with nmi {metrics['plan_nmi']:.3f}"
    if "plan_gain" in metrics:
        line += (f"; without the plan {metrics['planner_mask_delta_loss']:+.4f}, with one plan alone "
                 f"{metrics['plan_gain']:+.4f}")
    return line + f"; files in {folder}, pictures in {folder / 'plots'}"


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) / sqrt(H(a) H(b)) of two labellings, in [0, 1]; 0 where one of them is constant."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    table /= len(a)
    pa, pb = table.sum(1), table.sum(0)

    def H(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return float((H(pa) + H(pb) - H(table)) / math.sqrt(H(pa) * H(pb))) if H(pa) * H(pb) > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


def draw_loss(folder: Path, title: str) -> None:
    """Loss over training, from the run's metrics.jsonl, and the exact optimum where there is one."""
    history = read_metrics(folder)
    with figure(folder, "loss") as axes:
        for split, key, label, style, width in (
                ("train", "nll", "training", "-", 1.5), ("eval", "val_nll", "validation", "-", 1.5),
                ("eval", "oracle_nll", "exact optimum on the validation windows", "k--", 0.8)):
            records = [r for r in history if r["split"] == split and key in r]
            if records:
                values = [r[key] for r in records]
                axes.plot([r["step"] for r in records], values, style, label=label, linewidth=width)
        axes.set(xlabel="step", ylabel="nats a token", title=title)
        axes.legend(fontsize=8)


@torch.no_grad()
def draw_plans(folder: Path, model, corpus, starts: np.ndarray, usage: Sequence[float], most: int = 96) -> None:
    """Usage of the plans, transitions, and the belief over the beginning of the first validation window."""
    tokens, true = windows(model, corpus, starts[:1]), corpus.true_plans(starts[:1])
    draw_usage(folder, usage)
    draw_transition(folder, model.planner_transition_logits.softmax(1).float().cpu().numpy())
    model.eval()
    h, _ = model.read(tokens[:, :-1])
    evidence = model.look_up(h, tokens[:, 1:, None])[..., 0]
    beliefs = model.filter(evidence, model.contexts(h))
    model.train()
    after = (beliefs.before + evidence).softmax(2)[0, :most].float().cpu().numpy()
    begins = [t for t in range(1, len(after)) if (t + model.offset) % model.cfg.chunk_size == 0]
    labels = [corpus.spell(token) for token in tokens[0, 1 : len(after) + 1].tolist()]
    title = "belief after each token of a validation passage (blue: a chunk begins)"
    if true is not None:
        title += "; which of our plans stands for which true one is arbitrary"
    draw_beliefs(folder, "belief", after, labels, begins, title, () if true is None else true[0])


def draw_usage(folder: Path, usage: Sequence[float]) -> None:
    """Mean beliefs at chunk starts over training, or the last ones [K] where there was one evaluation."""
    K, records = len(usage), [r for r in read_metrics(folder) if r["split"] == "eval" and "usage" in r]
    colours = [f"C{k % 10}" for k in range(K)]
    with figure(folder, "plan_usage") as axes:
        axes.set(ylabel="mean belief at chunk starts", title="usage of the plans")
        if len(records) > 1:
            axes.stackplot([r["step"] for r in records], np.array([r["usage"] for r in records]).T, colors=colours,
                           labels=[f"plan {k}" for k in range(K)], alpha=0.85)
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
        for i, j in np.ndindex(P.shape) if K <= 16 else ():
            axes.text(j, i, f"{P[i, j]:.2f}", ha="center", va="center", fontsize=7,
                      color="white" if P[i, j] > 0.45 else "black")
        axes.set(xlabel="to plan", ylabel="from plan", xticks=range(K), yticks=range(K),
                 title="transition matrix, without what the text adds")


def draw_beliefs(folder: Path, name: str, beliefs: np.ndarray, labels: list[str], boundaries: list[int], title: str,
                 true: Sequence[int] = ()) -> None:
    """Beliefs [L, K] as a heat map over the text; boundaries: where a chunk begins; true: plans of the chunks."""
    width, height = max(7.0, 0.13 * len(labels)), 1.7 + 0.18 * beliefs.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not: drawn as boxes
        with figure(folder, name, width, height) as axes:
            image = axes.imshow(beliefs.T, aspect="auto", vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
            axes.figure.colorbar(image, ax=axes, label="belief", pad=0.01)
            for column in boundaries:
                axes.axvline(column - 0.5, color="tab:blue", linewidth=0.8)
            places = [0, *(column for column in boundaries if column + 6 < len(beliefs))]
            for column, plan in zip(places, true, strict=False):
                axes.text(column, -0.55, f"true plan {plan}", fontsize=7, va="bottom")
            axes.set_xticks(range(len(labels)), [drawable(text[:12]) for text in labels], rotation=90, fontsize=6)
            axes.set(yticks=range(beliefs.shape[1]), ylabel="plan")
            axes.set_title(title, fontsize=9, pad=14 if len(true) else 6)


def drawable(text: str) -> str:
    """A token as a label: line ends as an arrow, what cannot be printed as a dot, dollars as dollars."""
    shown = "".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\u00b7" for c in text)
    return shown.replace("$", "\\$") or "\u00b7"

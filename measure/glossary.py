"""What figures are: a sentence for each name that summaries, tables and reports show, for who meets it first.

    meaning("plan_gain", "apelr")   # "what the belief over plans is worth: ..."
    table("apelr")                  # the lines of a Markdown table of all of an experiment
"""

import re

FIGURES = {
    "": {
        "steps": "updates of the weights that the run made",
        "seconds": "time from start to end, on the machine below",
        "tokens_per_second": "tokens trained on in a second, evaluations left out",
        "cells_per_second": "cells trained on in a second, evaluations left out",
        "parameters": "numbers that are trained",
        "config_hash": "the same in runs of the same settings",
        "torch": "version of PyTorch",
        "device": "processor or GPU that trained",
        "perplexity": "exp of the cross entropy: among so many equally likely tokens the next one is lost",
    },
    "ghmm": {
        "loss": "cross entropy of the next token in nats, over all contexts: what is left to guess; less is better",
        "optimal_loss": "its floor, the entropy of the process: no predictor is below it",
        "excess_loss": "loss less floor, in nats: 0 is perfect",
        "excess_percent": "loss less floor, in percent of the floor",
        "loss_by_position": "loss after so many tokens of context",
        "optimal_loss_by_position": "its floor after so many tokens",
        "kl_by_position": "loss less floor after so many tokens: Kullback-Leibler divergence from the exact prediction",
        "r2_concat": (
            "share of the belief's variance that a linear map reads out of all layers, on contexts held out: 1 is"
            " all of it, 0 none"
        ),
        "r2_concat_spread": "standard deviation of r2_concat over the ways to hold contexts out",
        "r2_by_layer": "the same, read out of each layer alone",
        "untrained_r2_concat": "r2_concat of the network before training: what any random features of the context give",
        "untrained_r2_concat_spread": "its standard deviation over the ways to hold contexts out",
        "shuffled_r2_concat": "r2_concat of beliefs dealt out at random: what mere dimension gives, near 0 or below",
        "exact": "whether every context was looked at; else a sample was",
    },
    "arxiv": {
        "xe": "cross entropy of the next token in nats, a mean over positions; less is better",
        "val_xe": "cross entropy of the next token on validation documents, nats; best.pt is chosen by it",
        "test_xe": "cross entropy of the next token on test documents, nats, which nothing was chosen by",
        "unseen_xe": "cross entropy on documents of categories that were not trained on, nats",
        "oracle_xe": "cross entropy of the exact optimum, nats: no predictor is below it",
        "xe_by_position": "cross entropy after so many tokens of the document",
        "oracle_xe_by_position": "the same of the exact optimum",
        "icl_gain": "what reading the document is worth: cross entropy after 1 token less that after the last, nats",
        "oracle_icl_gain": "icl_gain of the exact optimum, which no model has to reach nor may pass by much",
        "total_gain": (
            "summed over positions, how far cross entropy is above that after the last token, nats a document"
        ),
        "icl_score": (
            "cross entropy late in a document less that early (Olsson et al. 2022): below 0 where context helps"
        ),
        "alpha": "exponent of the fit XE(t) = xe_inf + c t^-alpha to the tokens t read: more is a faster fall",
        "xe_inf": "cross entropy that the same fit tends to in a document without end, nats",
        "c": "what the same fit is above xe_inf after one token, nats",
        "fit": "parameters of XE(t) = xe_inf + c t^-alpha; none where the curve does not fall",
        "fits": "runs of which the curve has such a fit",
        "largest_excess": "distance from the exact optimum at the worst position, nats",
        "largest_relative_excess": "distance from the exact optimum at the worst position, as a share of it",
        "K": "categories or components trained on",
        "runs": "runs that the row is a mean of",
        "tokens": "tokens trained on, repeated ones too",
        "control_of": "the K whose share of tokens this run had of one category alone",
        "probe_accuracy": "how often a linear map reads the component out of the last layer, at the best position",
        "growth": "cross entropy of a category among K less that of it alone, at equal tokens, nats",
        "dilution": (
            "the part of growth that a run on the category alone has at that share of the tokens (and of the "
            "steps)"
        ),
        "interference": "the rest of growth: what the other categories cost, or give where it is below 0",
        "optimum_growth": "growth of the exact optimum: what not knowing the category costs any predictor",
        "b": "growth of cross entropy by an e-fold of K (2.7 times as many categories), nats",
        "seen_xe": "cross entropy of the categories where they were trained on, nats",
        "log_K": "most that a document can tell of its component, nats",
        "information_document": "what a document tells of its component, nats: at most log K",
        "information_predictions": "the same without its first token, which nobody predicts",
        "information_model": "what the model pays for it, with its distance from the optimum",
        "excess": "distance from the exact optimum, a mean over positions, nats",
        "worst_excess": "distance from the exact optimum at the worst position, nats",
        "final_split": "the documents that final numbers are of: test, or validation where there is no test",
        "train_chunks": "pieces of documents trained on",
    },
    "apelr": {
        "val_nll": "cross entropy of the next token on validation text, nats; less is better",
        "val_ppl": "its exp, the perplexity: among so many equally likely tokens the next one is lost",
        "oracle_nll": "cross entropy of the exact optimum on the same text, nats: no predictor is below it",
        "excess_over_oracle": "how far val_nll is above oracle_nll, as a share of it",
        "plan_gain": (
            "what the belief over plans is worth: loss of the best single plan less val_nll, nats; the plan is used "
            "where this and the mask delta are 0.01 or more"
        ),
        "planner_mask_delta_loss": (
            "the mask delta: what val_nll rises by if the belief is replaced by an even one, nats; 0 where the "
            "belief says nothing"
        ),
        "forced_nll": "loss if one plan writes all of the text, of each plan, nats",
        "plan_nmi": (
            "normalised mutual information of the plans found and the true ones: 1 is the same up to their names,"
            " 0 unrelated"
        ),
        "state_persistence": "how often the likeliest plan of a chunk is that of the chunk before",
        "expert_utilization": "how evenly plans are used: 1 all alike, 0 one alone",
        "usage": "mean belief in each plan",
        "transition_mean_diagonal": "probability that a plan stays for the next chunk, a mean over plans",
        "transition_row_entropy": "entropy of the next plan given this one, nats: 0 if it is certain",
        "forced_state_divergence": "how much the words of plans 0 and 1 differ: Jensen-Shannon divergence, nats",
        "forced_state_divergence_all_pairs": "the same, a mean over all pairs of plans",
        "baseline_nll": "val_nll of a model of equal size without plans",
        "baseline_ppl": "its exp",
        "baseline_parameters": "numbers that are trained of it",
        "version": "the planner: v1, v2_planner_required, or baseline, which has none",
    },
    "state": {
        "pearson_delta": (
            "correlation over genes of predicted and measured change of the mean cell, a mean over conditions "
            "held out: 1 is perfect, 0 no better than to predict no change"
        ),
        "mae": "mean absolute error of a gene in the mean cell; less is better",
        "mse": "mean squared error of a gene in the mean cell; less is better",
        "discrimination": (
            "how well a prediction tells its perturbation from the others of that cell type: 1 is always, about "
            "0.5 by chance"
        ),
        "overlap_at_50": (
            "share of the 50 genes that change most which are among the 50 predicted to; likewise _at_100 and so "
            "on, _at_N of all that change"
        ),
        "precision_at_50": (
            "share of the 50 genes predicted to change most which do; likewise _at_100 and so on, _at_N of all"
        ),
        "energy_distance": (
            "distance of the predicted cells from the measured ones as distributions: 0 is the same; less is "
            "better"
        ),
        "val_loss": "lowest loss on validation conditions, by which best.pt is chosen",
        "conditions": "pairs of cell type and perturbation that were held out",
        "conditions_judged": "those of them for which the model and all baselines have the figure",
        "perturbation_mean": (
            "pearson_delta of the baseline that predicts the perturbation's mean change in other types"
        ),
        "context_mean": "of the baseline that predicts the mean change of all perturbations in that cell type",
        "control_mean": "of the baseline that predicts no change",
        "baselines": "the same figures of predictions that learn nothing but means",
    },
}
COLUMNS = {  # of the tables of a study, beside the figures
    "sets": "sets of K categories that there are runs of",
    "of": "whose cross entropy the law is of",
    "law": "how cross entropy (XE) grows with K",
    "low": "lower end of the 95% interval",
    "high": "upper end of the 95% interval",
    "rms": "how far the law is off at the K that it is fitted to: root mean square, nats",
    "held_out_rms": "how far it is off at a K that it has not seen, each K in turn: root mean square, nats",
    "sd_sets": "standard deviation over sets, each category's own level taken off",
    "sd_seeds": "standard deviation over seeds within a set",
    "se_documents": "standard error by the documents that were drawn",
    "position": "tokens read",
}
PICTURES = {  # by the name of their file: what is on them, and what to look for
    "beliefs": (
        "Beliefs about the state of the process, and what a linear map reads out of the activations, a point for each"
        " context, larger where it is likelier. The more alike the two are, the better the network holds the belief."
        " Where there are crosses, each is certainty of a state."
    ),
    "belief": "What the model believes about the plan after each token of a passage: dark is sure.",
    "component_probe": (
        "How often a linear map reads the component of a document out of each layer, by tokens read; dotted is chance."
    ),
    "delta": (
        "Predicted and measured change of each gene, a panel a condition: on the line the prediction is right."
        " Triangles are the best baseline."
    ),
    "metrics": "Means of the model and of the baselines over the conditions, a panel a metric.",
    "excess_by_position": "How far cross entropy is above the exact optimum after so many tokens: 0 is perfect.",
    "excess_loss": "How far the loss is above the floor while training: 0 is perfect.",
    "loss": "Loss while training, and where it was evaluated; dashed is what no predictor can be below, where known.",
    "loss_by_position": "Loss after so many tokens of context; dashed is the floor, which no predictor is below.",
    "plan_usage": "How much each plan is used while training: bands of one height are used alike.",
    "r2_by_layer": (
        "Share of the belief's variance that a linear map reads out of each layer, on contexts held out. Lines: what it"
        " reads out of a network before training, and of beliefs dealt out at random."
    ),
    "transition_matrix": "How likely each plan (across) follows each other one (down).",
    "xe_by_position": (
        "Cross entropy of the next token after so many tokens of a document: it falls where they tell something. Bands"
        " are 95% intervals; dashed is the exact optimum, where known."
    ),
}
SUFFIXES = {
    "sd": "standard deviation over seeds (and sets) of {}",
    "se": "standard error of {}",
    "n": "runs that have a figure {}",
    "low": "lower end of the 95% interval of {}",
    "high": "upper end of the 95% interval of {}",
    "interval": "95% interval of {}",
    "definition": "what {} is in this run",
}


def meaning(name: str, experiment: str = "") -> str:
    """A sentence on a figure of an experiment, "" where its name says all there is.

    name: of summary.json, dotted where it is in a table there; or a column, such as xe_sd.
    """
    known = FIGURES[""] | FIGURES.get(experiment, {})
    if experiment == "arxiv":
        known = COLUMNS | known
    if name in known:
        return known[name]
    *tables, last = name.split(".")
    if tables and last in known:
        return f"{last} of {tables[-1]}: {known[last]}"
    stem, _, suffix = re.sub(r"[ _](?=[a-z]+$)", "\0", last).partition("\0")
    if suffix in SUFFIXES and stem in known:
        return SUFFIXES[suffix].format(stem)
    stem, place, number = last.partition("_at_")
    alike = [other for other in known if other.startswith(f"{stem}_at_")]
    if place and alike:
        return known[alike[0]].replace(alike[0].partition("_at_")[2], number).partition("; likewise")[0]
    return f"{known[stem]}, after {number} tokens" if place and stem in known else ""


def caption(picture: str, experiment: str = "") -> str:
    """What is on a picture of a run, by the name of its file without .png."""
    if picture in PICTURES:
        return PICTURES[picture]
    name = picture.removesuffix("_by_perturbation")
    said = meaning(name, experiment) if name != picture else ""
    if said:
        return f"{name}: {said.partition('; likewise')[0]}. A line is a condition; rings are the best baseline."
    return f"{picture.replace('_', ' ').capitalize()}."


def table(experiment: str) -> list[str]:
    """The lines of a Markdown table of the figures of an experiment."""
    return [f"| `{name}` | {said} |" for name, said in FIGURES[experiment].items()]

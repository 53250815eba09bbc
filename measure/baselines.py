"""Rivals of a model of perturbations that know means only: what they learn from the cells trained on.

A context is the cells of one type in one file, (file, cell type): its perturbed cells are predicted from its control
cells, and measured against them. Those of a namesake in another file are of another experiment. G genes.
"""

import numpy as np

from common.telling import bar

Context = tuple[int, int]  # codes of file and cell type
Condition = tuple[Context, int]  # and of the perturbation


class Baselines:
    """Predicted means of held-out conditions, from the cells trained on alone.

    Args:
        means, counts: mean [G] and number of the perturbed training cells of each condition that has any.
        control_means: mean [G] of the control cells of each context that has any.
    An effect is mean - control mean of the same context.
    - control_mean: no effect.
    - perturbation_mean: control mean + mean effect of the perturbation over training contexts, each weighing the same
      (arc-state's perturb_mean); of a perturbation never trained on, the mean effect of all (there: none).
    - context_mean: mean of all perturbed training cells of the context, each cell weighing the same (arc-state's
      context_mean); of a context without any, control mean + mean effect of all (there: the control mean, a weaker
      rival).
    The mean effect of all weighs perturbations the same, each averaged over contexts as above. Where no effect is
    known, as no perturbed cells train, or none beside control cells, it is nan, for not to know an effect is not to
    predict none; so is, without control cells of the context, a mean that needs them.
    """

    def __init__(
        self,
        means: dict[Condition, np.ndarray],
        counts: dict[Condition, int],
        control_means: dict[Context, np.ndarray],
    ):
        self.control_means = control_means
        # By perturbation: its effect in each context. By context: sum and number of its perturbed cells.
        effects = {}
        contexts = {}  # of each perturbation, how many
        self.sums = {}
        self.numbers = {}
        for context, perturbation in sorted(means):
            mean = means[context, perturbation]
            number = counts[context, perturbation]
            self.sums[context] = self.sums.get(context, 0) + number * mean
            self.numbers[context] = self.numbers.get(context, 0) + number
            if context in control_means:
                effect = mean - control_means[context]
                # Added up as they come: all of them would be as large as the means once more.
                effects[perturbation] = effects[perturbation] + effect if perturbation in effects else effect
                contexts[perturbation] = contexts.get(perturbation, 0) + 1
        self.effects = {}
        for perturbation, total in sorted(effects.items()):
            self.effects[perturbation] = total / contexts[perturbation]
        self.average = np.nan
        if effects:
            self.average = sum(self.effects.values()) / len(effects)

    def predict(self, held_out: list[Condition], genes: int) -> dict[str, np.ndarray]:
        """Name of a baseline -> the means [len(held_out), genes] that it predicts."""
        unknown = np.full(genes, np.nan)
        base = []
        shift = []
        context_mean = []
        for context, perturbation in held_out:
            control = self.control_means.get(context, unknown)
            base.append(control)
            shift.append(np.broadcast_to(self.effects.get(perturbation, self.average), genes))
            if context in self.numbers:
                context_mean.append(self.sums[context] / self.numbers[context])
            else:
                context_mean.append(control + self.average)
        control_mean = np.array(base, np.float64)
        return {
            "control_mean": control_mean,
            "perturbation_mean": control_mean + np.array(shift),
            "context_mean": np.array(context_mean),
        }


def control_rows(cells, context: Context) -> np.ndarray:
    """Rows of the control cells of a context that any split uses, ascending; cells: a Cells of sources.cells."""
    file, cell_type = context
    of_context = (cells.file == file) & (cells.cell_type == cell_type)
    return np.flatnonzero(of_context & cells.is_control & (cells.member > 0))


def train_baselines(cells, which: str, block: int = 8_192) -> Baselines:
    """The baselines of the cells trained on (a Cells of sources.cells), means in float64; which: "input" or "counts".

    Only conditions that occur are held in memory: [conditions, G].
    """
    controls = np.flatnonzero(cells.is_control & (cells.member > 0))
    perturbed = cells.rows("train", controls=False)
    rows = np.concatenate([perturbed, controls])

    # By condition, so that the cells of one follow one another and are added up a run at a time.
    types = len(cells.cell_types)
    perturbations = len(cells.perturbations)
    context = cells.file[rows].astype(np.int64) * types + cells.cell_type[rows]
    code = context * perturbations + cells.perturbation[rows]
    order = np.argsort(code, kind="stable")
    rows = rows[order]
    code = code[order]
    begins = np.flatnonzero(np.diff(code, prepend=-1))  # of each condition
    counts = np.diff(begins, append=len(rows))
    place = np.repeat(np.arange(len(begins)), counts)  # of each cell's condition
    sums = None  # [conditions, G], once G is known
    for i in bar(range(0, len(rows), block), f"means of {len(rows):,} cells, for the baselines"):
        expression = cells.read(rows[i : i + block], which)
        expression = expression.cpu().double().numpy()  # [block, G]; on the CPU first: Metal has no float64
        if sums is None:
            sums = np.zeros((len(begins), expression.shape[1]))
        places = place[i : i + block]
        first = np.flatnonzero(np.diff(places, prepend=-1))  # of each run of cells of one condition
        sums[places[first]] += np.add.reduceat(expression, first)

    if len(rows):
        sums /= counts[:, None]  # in place: of many conditions and genes they are most of the memory
    means = {}
    numbers = {}
    control_means = {}
    for i, condition in enumerate(code[begins].tolist()):
        context, perturbation = divmod(condition, perturbations)
        context = divmod(context, types)
        mean = sums[i]
        if perturbation == cells.control:
            control_means[context] = mean
        else:  # a control is no perturbation
            means[context, perturbation] = mean
            numbers[context, perturbation] = int(counts[i])
    return Baselines(means, numbers, control_means)

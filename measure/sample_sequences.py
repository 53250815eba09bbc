"""Sequences that a model of train_ghmm.py or train_arxiv.py writes, with what it and the process say of each token.

page: the module of the run's page; cfg: what sample.py was asked for. Dimensions: B samples, L tokens.
"""

from pathlib import Path
from types import ModuleType

import torch

from common.runtime import Runtime
from common.telling import doing, note
from configurator import fail
from measure.sampling import PLAIN, Show, lengths_of, manner, nats, prompts_of, settled, spelled, tokenizer_of
from measure.sequences import continue_sequences, process_sequences, sequence_xe
from measure.transcript import beneath, sentence, title, wrapped
from sources.prompts import Prompt
from sources.shared import counted
from sources.tokenizer import Tokenizer


def sample_ghmm(page: ModuleType, path: Path, cfg, show: Show) -> dict:
    """Sequences from the model and from the process, what both say of each token, and the KL by position."""
    cfg = settled(cfg, PLAIN)
    run, process, model, step = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    prompts = prompts_of(cfg, None, process.vocab_size)
    lengths = lengths_of(cfg, prompts, run.n_ctx)
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], dtype=torch.int64)
        if process.log_prob(ids).isinf().any():
            fail(f"{prompt.place} = {prompt.text}: these tokens have probability 0 under {process.name}")
    result = {"experiment": "ghmm", "step": step, "samples": [], "process": []}
    show(sentence(f"{process.name}, {run.model} after {counted(step, 'step')}; {manner(cfg)}"))
    show(sentence("Under each token its log-probability in nats, given the tokens before it: by the process, which is "
                  "exact, and by the model."))
    with Runtime(run) as rt:
        place = page.exact_device(rt)  # float64, which not every accelerator has
        process.to(place)
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            drawn, true = draw_sequences(process, model, prompt, length, run.n_ctx, cfg, rt, place)
            for name, source, sequences in (("samples", "model", drawn), ("process", "process", true)):
                entries = judged(sequences, prompt, process, model, run.n_ctx, rt)
                result[name] += entries
                show_sequences(entries, f"from the {source}, sample", show)
        # Over all words of the length where they are few, else over sampled ones: what the run's own evaluation does.
        with doing("comparing the model's predictions with the optimal ones"):
            contexts = page.make_contexts(process, run.n_ctx, run.max_words, 4_096, cfg.seed)
            optimal = process.optimal_loss(run.n_ctx)
            evaluation = page.evaluate(model, contexts, optimal, rt)
    kl = evaluation["kl_by_position"]
    result["kl_by_position"] = kl
    show("\n" + sentence("KL(optimal || model) in nats: what its prediction loses to the best possible one, after "
                          "reading"))
    show(beneath({"tokens": [str(i) for i in range(1, len(kl) + 1)], "KL": [f"{x:.1e}" for x in kl]}))
    return result


def draw_sequences(process, model, prompt: Prompt, length: int, n_ctx: int, cfg, rt: Runtime, place
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences [B, L] of the model, as many of the process) that go on from a prompt, on the process's device."""
    start = torch.tensor([prompt.ids], dtype=torch.int64, device=place)
    start = start.expand(cfg.num_samples, -1)  # [B, T]
    # Each draw has a generator of its own, so that longer sequences begin like shorter ones of the same seed.
    token_draws = rt.generator(0, device=place)
    state_draws = rt.generator(3, device=place)
    size = f"{counted(cfg.num_samples, 'sequence')} of {length:,} tokens"
    told = f"drawing {size} from the process"
    true = process_sequences(process, start, length, token_draws, state_draws, told)
    # The model predicts from one token on; without a prompt the process gives the first, or its likeliest one.
    if not prompt.ids:
        start = true[:, :1]
        if cfg.temperature == 0:
            chances = [round(process.word_probability([token]), 12) for token in range(process.vocab_size)]
            start = torch.full_like(start, chances.index(max(chances)))
    model_draws = rt.generator(1, device=place)
    drawn = continue_sequences(
        model,
        start,
        length,
        n_ctx,
        model_draws,
        rt.device,
        cfg.temperature,
        cfg.top_k,
        cfg.top_p,
        told=f"drawing {size} from the model",
    )
    return drawn, true


def judged(sequences: torch.Tensor, prompt: Prompt, process, model, n_ctx: int, rt: Runtime) -> list[dict]:
    """Sequences as plain data, with what the process and the model say of each token."""
    with doing("reading them by the process"):
        log_prob = process.log_prob(sequences).tolist()
    xe = sequence_xe(model, sequences.to(rt.device), n_ctx, "reading them by the model").tolist()
    entries = []
    for b, tokens in enumerate(sequences.tolist()):
        entries.append({"prompt": prompt.text, "tokens": tokens, "log_prob": log_prob[b], "xe": xe[b]})
    return entries


def show_sequences(entries: list[dict], kind: str, show: Show) -> None:
    for i, entry in enumerate(entries, 1):
        total = f"log p {sum(entry['log_prob']):.2f} nats by the process"
        show("\n" + title(kind, i, len(entries), entry["prompt"], total))
        rows = {
            "token": [str(token) for token in entry["tokens"]],
            "process": nats(entry["log_prob"]),
            "model": ["", *nats([-value for value in entry["xe"]])],  # which does not predict the first token
        }
        show(beneath(rows))


# ---------------------------------------------------------------------------------------------------------------
# arxiv
# ---------------------------------------------------------------------------------------------------------------
def sample_arxiv(page: ModuleType, path: Path, cfg, show: Show) -> dict:
    """Texts that go on from the prompts, with the model's cross entropy of every token, prompt included."""
    cfg = settled(cfg, PLAIN)
    run, model, step, extra = page.load_run(path, cfg.device)
    run.seed = cfg.seed
    run.precision = "fp32"
    tokenizer = tokenizer_of(path)
    n_ctx = extra["n_ctx"]
    vocab_size = extra["vocab_size"]
    prompts = prompts_of(cfg, tokenizer, vocab_size)
    lengths = lengths_of(cfg, prompts, n_ctx)
    categories = extra["categories"]
    kinds = f"K = {len(categories)} ({', '.join(categories)})"
    show(sentence(f"{kinds} after {counted(step, 'step')}; {manner(cfg)}"))
    show(sentence("Under each token its cross entropy in nats: -log p by the model, given the tokens before it."))
    result = {"experiment": "arxiv", "step": step, "samples": []}
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        for prompt, length in zip(prompts, lengths, strict=True):
            generator = rt.generator(0, device="cpu")  # anew: a prompt in a file gives what it gives alone
            ids = prompt.ids
            if not ids:  # the model predicts from one token on
                ids = torch.randint(vocab_size, (1,), generator=generator).tolist()
                note(f"no prompt: samples begin with a token drawn at random, {spelled(ids[0], tokenizer)!r}")
            tokens = continue_sequences(
                model,
                torch.tensor([ids]).expand(cfg.num_samples, -1),
                length,
                n_ctx,
                generator,
                rt.device,
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
                told=f"writing {counted(cfg.num_samples, 'text')} of {length:,} tokens",
            )
            xe = sequence_xe(model, tokens.to(rt.device), n_ctx, "reading them by the model").tolist()
            entries = []
            for row, values in zip(tokens.tolist(), xe, strict=True):
                entry = {"prompt": prompt.text, "tokens": row, "xe": values}
                if tokenizer:
                    entry["text"] = tokenizer.decode(row)
                entries.append(entry)
            result["samples"] += entries
            for i, entry in enumerate(entries, 1):
                show_judged(entry, i, len(entries), tokenizer, show)
    return result


def show_judged(entry: dict, number: int, count: int, tokenizer: Tokenizer | None, show: Show) -> None:
    """A text, and each token with its cross entropy, but for the first, which nobody predicts."""
    xe = entry["xe"]
    figures = [f"mean {sum(xe) / len(xe):.3f} nats a token"] if xe else []
    show("\n" + title("sample", number, count, entry["prompt"], *figures))
    if tokenizer:
        show(wrapped(entry["text"]) + "\n")
    words = [spelled(token, tokenizer) for token in entry["tokens"]]
    show(beneath({"token": words, "nats": ["", *nats(xe)]}))

"""Sample from a trained model: the experiment and its settings are read from the checkpoint.

    python sample.py out/ghmm                              # sequences of the model beside sequences of its process
    python sample.py out/ghmm --num_samples=2 --length=30 --prompt=0,1 --temperature=0.8
    python sample.py out/arxiv_small/K1_csDS --prompt="We give a faster algorithm" --top_k=50
    python sample.py out/ghmm/best.pt --json=samples.json

ghmm: tokens with their log-probabilities under the true process, and how far the model's predictions are from the
optimal ones at each position. arxiv: text that goes on from the prompt, with the cross entropy of every token.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import prepare_data
import train_arxiv
import train_ghmm
from common import checkpoint
from common.runtime import Runtime
from configurator import configure, fail


@dataclass
class Config:
    # sampling
    num_samples: int = 4  # sequences of the model, and as many of the process
    length: int | None = None  # tokens a sequence; default the model's n_ctx
    prompt: str = ""  # what every sequence begins with: token ids like 0,1,2, or text where the run has a tokenizer
    temperature: float = 1.0  # divides the logits; 1 samples what the model believes
    top_k: int | None = None  # sample from the k likeliest tokens only
    json: str = ""  # file to write the samples to as well
    # system
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps

    def check(self) -> list[str]:
        wrong = [f"{k} = {getattr(self, k)}: must be at least 1" for k in ("num_samples", "length", "top_k")
                 if getattr(self, k) is not None and getattr(self, k) < 1]
        wrong += [f"seed = {self.seed}: must be in [0, 2**63)"] if not 0 <= self.seed < 2**63 else []
        return wrong + ([f"temperature = {self.temperature}: must be at least 1e-6"] if self.temperature < 1e-6 else [])


@torch.no_grad()
def continue_sequences(model, device, tokens: torch.Tensor, length: int, n_ctx: int, cfg: Config, generator):
    """Draw from the model until the sequences [B, T] have the length; it reads the last n_ctx tokens of each."""
    while tokens.shape[1] < length:
        logits, _ = model(tokens[:, -n_ctx:].to(device))
        logits = logits[:, -1].to(tokens.device).double() / cfg.temperature
        if cfg.top_k and cfg.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(cfg.top_k).values[:, -1:], -torch.inf)
        probs = logits.softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], 1)
    return tokens


def token_ids(prompt: str, vocab_size: int) -> list[int]:
    """The prompt as token ids; exits with code 2 where it is something else."""
    parts = [part.strip() for part in prompt.split(",")] if prompt.strip() else []
    if not all(part.isdigit() and int(part) < vocab_size for part in parts):
        fail(f"prompt = {prompt!r}: expected token ids from 0 to {vocab_size - 1}, like 0,1")
    return [int(part) for part in parts]


def sample_ghmm(path: Path, cfg: Config) -> dict:
    """Sequences from the model and from the process, each token's true log-probability, and the KL by position."""
    run, process, model, step = train_ghmm.load_run(path, cfg.device)
    run.seed, run.precision = cfg.seed, "fp32"
    length = cfg.length or run.n_ctx
    prompt = torch.tensor([token_ids(cfg.prompt, process.vocab_size)], dtype=torch.int64)
    if process.log_prob(prompt).isinf().any():
        fail(f"prompt = {cfg.prompt}: these tokens have probability 0 under {process.name}")
    with Runtime(run) as rt:
        floor = process.optimal_loss(run.n_ctx)
        place = train_ghmm.exact_device(rt)
        process.to(place)
        model.to(rt.device).eval()
        start = prompt.to(place).expand(cfg.num_samples, -1)
        belief = process.beliefs(start)[:, -1]
        shape = (length + 1, cfg.num_samples)
        drawn = torch.rand(shape, generator=rt.generator(0, device=place), dtype=torch.float64, device=place)
        if process.is_hmm:  # a belief is the distribution of the hidden state to go on from
            belief = torch.multinomial(belief, 1, generator=rt.generator(3, device=place))[:, 0]
        true, _ = process.generate(drawn, belief)
        true = torch.cat([start, true], 1)[:, :max(length, start.shape[1])]
        # The model predicts from one token on; without a prompt the process gives the first.
        tokens = start if start.shape[1] else true[:, :1]
        generator = rt.generator(1, device=place)
        tokens = continue_sequences(model, rt.device, tokens, length, run.n_ctx, cfg, generator)
        contexts = train_ghmm.make_contexts(process, run.n_ctx, run.max_words, 4_096, cfg.seed)
        kl = train_ghmm.evaluate(model, process, contexts, floor, rt)["kl_by_position"]
        result = {"experiment": "ghmm", "step": step, "kl_by_position": kl}
        for name, sequences in (("model", tokens), ("process", true)):
            result[name] = {"tokens": sequences.tolist(), "log_prob": process.log_prob(sequences).tolist()}
    print(f"{process.name}, {run.model} after {step} steps. Log-probabilities in nats, under the true process.")
    for name in ("model", "process"):
        print(f"\nfrom the {name}:")
        for row, log_probs in zip(result[name]["tokens"], result[name]["log_prob"], strict=True):
            print("  token " + " ".join(f"{x:>6}" for x in row))
            print("  log p " + " ".join(f"{x:6.2f}" for x in log_probs) + f"   sum {sum(log_probs):.2f}")
    print("\nKL(optimal || model) in nats, after reading")
    print("  tokens " + " ".join(f"{i:>8}" for i in range(1, len(kl) + 1)))
    print("  KL     " + " ".join(f"{x:8.1e}" for x in kl))
    return result


@torch.no_grad()
def sequence_xe(model, tokens: torch.Tensor, n_ctx: int) -> torch.Tensor:
    """Cross entropy in nats of every token but the first, [B, L - 1]; each is predicted from the n_ctx before it."""
    head = tokens[:, : n_ctx + 1]
    found = [train_arxiv.token_xe(model(head[:, :-1])[0], head[:, 1:])] if head.shape[1] > 1 else []
    for t in range(n_ctx + 1, tokens.shape[1]):
        found.append(train_arxiv.token_xe(model(tokens[:, t - n_ctx : t])[0][:, -1:], tokens[:, t : t + 1]))
    return torch.cat(found, 1) if found else torch.zeros(len(tokens), 0)


def sample_arxiv(path: Path, cfg: Config) -> dict:
    """Texts that go on from the prompt, with the model's cross entropy of every token, prompt included."""
    run, model, step, extra = train_arxiv.load_run(path, cfg.device)
    run.seed, run.precision = cfg.seed, "fp32"
    speller = (path if path.is_dir() else path.parent) / "tokenizer.json"
    tokenizer = prepare_data.load_tokenizer(speller) if speller.exists() else None
    ids = tokenizer.encode(cfg.prompt) if tokenizer else token_ids(cfg.prompt, extra["vocab_size"])
    length = max(cfg.length or extra["n_ctx"], len(ids))
    with Runtime(run) as rt:
        model.to(rt.device).eval()
        generator = rt.generator(0, device="cpu")
        if not ids:  # the model predicts from one token on
            ids = torch.randint(extra["vocab_size"], (1,), generator=generator).tolist()
        tokens = torch.tensor([ids]).expand(cfg.num_samples, -1)
        tokens = continue_sequences(model, rt.device, tokens, length, extra["n_ctx"], cfg, generator)
        xe = sequence_xe(model, tokens.to(rt.device), extra["n_ctx"]).tolist()
    result = {"experiment": "arxiv", "step": step, "tokens": tokens.tolist(), "xe": xe}
    print(f"K = {len(extra['categories'])} ({', '.join(extra['categories'])}), {step} steps. Cross entropies in nats.")
    if tokenizer:
        result["text"] = [tokenizer.decode(row) for row in tokens]
    for i, row in enumerate(tokens.tolist()):
        words = [repr(tokenizer.decode([t]))[1:-1] if tokenizer else str(t) for t in row]
        print("\n" + (result["text"][i] if tokenizer else " ".join(words)))
        print("  " + " ".join([words[0]] + [f"{w}|{x:.2f}" for w, x in zip(words[1:], xe[i], strict=True)]))
        print(f"  mean {sum(xe[i]) / max(1, len(xe[i])):.3f}")
    return result


SAMPLERS = {"ghmm": sample_ghmm, "arxiv": sample_arxiv}


def main(argv: list[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        configure(Config, ["--help"])
    if argv[0].startswith("-"):
        fail(f"the first argument is a run folder or checkpoint, not {argv[0]!r}: python sample.py out/ghmm {argv[0]}")
    cfg = configure(Config, argv[1:])
    if cfg.json and (Path(cfg.json).is_dir() or not Path(cfg.json).resolve().parent.is_dir()):
        fail(f"json = {cfg.json}: not a file in a folder that exists")
    try:
        experiment = checkpoint.load(Path(argv[0]))["experiment"]
        if experiment not in SAMPLERS:
            fail(f"{argv[0]} is a run of {experiment!r}; sample.py knows {', '.join(SAMPLERS)}")
        result = SAMPLERS[experiment](Path(argv[0]), cfg)
    except (checkpoint.CheckpointError, train_ghmm.ProcessError, prepare_data.DataError) as e:
        fail(str(e))
    if cfg.json:
        finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # -inf of impossible tokens becomes null
        Path(cfg.json).write_text(json.dumps(finite) + "\n", encoding="utf-8")
        print(f"\nwritten to {cfg.json}")
    return result


if __name__ == "__main__":
    main()

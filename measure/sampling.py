"""What sampling of every experiment shares: settings with their defaults, prompts and lengths, tokens in words.

cfg: what sample.py was asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common.telling import note
from configurator import fail
from sources.prompts import Prompt, read_prompt, written_prompts
from sources.shared import counted
from sources.tokenizer import Tokenizer, load_tokenizer

PLAIN = {"num_samples": 4, "temperature": 1.0, "top_k": 0}  # what is not asked for
MOST_TOKENS = 10**9  # of all samples together: their ids alone take 8 GB
Show = Callable[[str], None]  # what results are printed by: print, or nothing where they are JSON


def settled(cfg, defaults: dict):
    """The settings with what is not asked for. At temperature 0 all samples of a prompt would be equal: one is made."""
    settings = {name: value for name, value in defaults.items() if getattr(cfg, name) is None}
    if cfg.sweep_states and cfg.num_samples is None:
        settings["num_samples"] = 1
    if cfg.temperature == 0:
        settings["num_samples"] = 1
        if (cfg.num_samples or 1) > 1:
            note("at temperature 0 every sample of a prompt would be the same: one is written")
    return replace(cfg, **settings)


def manner(cfg) -> str:
    """How tokens are chosen, in a few words."""
    if cfg.temperature == 0:
        return "temperature 0: always the likeliest token"
    words = [f"temperature {cfg.temperature:g}"]
    if cfg.top_k:
        words.append(f"top_k {cfg.top_k}")
    if cfg.top_p < 1:
        words.append(f"top_p {cfg.top_p:g}")
    return ", ".join([*words, f"seed {cfg.seed}"])


def prompts_of(cfg, tokenizer: Tokenizer | None, vocab_size: int, reads_pipe: bool = False) -> list[Prompt]:
    """What is to be gone on from, in the order it was given; one empty prompt where nothing was."""
    prompts = []
    for place, written in written_prompts(cfg.prompt, cfg.prompts, reads_pipe):
        prompts.append(read_prompt(written, place, tokenizer, vocab_size))
    return prompts or [Prompt("", [], "prompt")]


def lengths_of(cfg, prompts: list[Prompt], default: int, default_new: int = 0) -> list[int]:
    """Tokens of a sample of each prompt, prompt included: as asked, or `default` in all, or `default_new` new ones.

    Exits with code 2 where a prompt leaves no room, or all samples together are beyond reason.
    """
    lengths = []
    for prompt in prompts:
        count = len(prompt.ids)
        length = cfg.length or default
        if cfg.max_new_tokens or not cfg.length and default_new:
            length = count + (cfg.max_new_tokens or default_new)
        if count >= length:
            fail(f"{prompt.place} has {counted(count, 'token')}, and length = {length} counts it: to go on from it, "
                 f"use --max_new_tokens=N, or a length above {count}")
        lengths.append(length)
    total = cfg.num_samples * sum(lengths)
    if total > MOST_TOKENS:
        fail(f"{total:,} tokens are more than {MOST_TOKENS:,}: ask for fewer or shorter samples")
    return lengths


def run_folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == "checkpoints" else folder  # of a source's run


def tokenizer_of(path: Path, known: str | None = None) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint, if there is one, or that is known to be of it."""
    file = Path(known) if known else run_folder(path) / "tokenizer.json"
    return load_tokenizer(file) if file.exists() else None


def spell(tokens: list[int], tokenizer: Tokenizer | None) -> str:
    """Tokens as text, or as their ids where there is no tokenizer."""
    if tokenizer:
        return tokenizer.decode(tokens)
    return " ".join(str(token) for token in tokens)


def spelled(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as a cell of a line: with line ends and the like as they are written in code."""
    return repr(tokenizer.decode([token]))[1:-1] if tokenizer else str(token)


def nats(values: list[float]) -> list[str]:
    """-0.39 and the like, in cells; -inf of what is impossible."""
    return [f"{value:.2f}" for value in values]

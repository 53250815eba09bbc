"""Files of APEL-R in train_apelr.py, sample.py and prepare_data.py: its tokenizers, checkpoints, sampler."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refusal
from torch.func import functional_call

import prepare_data
import sample
import train_apelr
from common import checkpoint
from common.errors import CheckpointError, DataError
from common.runtime import Runtime, learning_rate
from measure import sample_texts
from measure.writing import predict, prefill
from sources.corpus import read_corpus
from sources.foreign_apelr import V1, V2, tokenizer_file
from sources.tokenizer import load_tokenizer
from train_apelr import Batches, Config, build_model, load_source_checkpoint

pytestmark = pytest.mark.usefixtures("quickly")

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).resolve().parents[1] / "../shared/reference"))
ITOS = ["<pad>", "<bos>", "<eos>", "<unk>", *" aceinopOtumrs."]  # as the source lists them: special ones, then others
TINY = ("--seq_len=19", "--batch_size=8", "--log_interval=2", "--eval_batches=1", "--final_eval_batches=1",
        "--preview_tokens=0", "--device=cpu", "--precision=fp32", "--warmup_steps=0", "--out_dir=run")  # fmt: skip
SHAPE = {"num_plan_states": 3, "chunk_size": 4, "token_dim": 8, "num_layers": 1, "dropout": 0.0}  # by their names
TERMS = {
    V1: {"entropy_reg_weight": 0.1, "usage_balance_weight": 0.1, "chunk_post_kl_weight": 0.1},
    V2: {"loss_weights": {"future_contrastive": 0.2, "boundary_entropy": 0.1}},
}


def refused(capsys, *argv: str, main=train_apelr.main) -> str:
    return refusal(capsys, main, *map(str, argv))


@pytest.fixture(scope="module")
def itos(tmp_path_factory) -> Path:
    """A character tokenizer in the form of the source's file."""
    file = tmp_path_factory.mktemp("itos") / "tokenizer.json"
    file.write_text(json.dumps({"itos": ITOS}, indent=2))
    return file


@pytest.fixture(scope="module")
def text(itos) -> Path:
    """A little text in the characters of that tokenizer."""
    folder = itos.parent
    lines = [f"Once upon a time {who} sat on a {what}.<|endoftext|>\n" for what in ("mat", "cot", "pan", "tree", "sea")
             for who in ("a cat", "a man", "an ant", "a mouse") for _ in range(9)]  # fmt: skip
    (folder / "stories.txt").write_text("".join(lines))
    prepare_data.main(["text", f"--input={folder / 'stories.txt'}", f"--tokenizer={itos}", "--val_fraction=0.3",
                       f"--out_dir={folder / 'data'}"])  # fmt: skip
    return folder / "data"


def fables(*beginnings: str) -> str:
    """Twenty documents for each beginning, none like another, which one split would get."""
    return "".join(f"{text}{'.' * n}<|endoftext|>\n" for text in beginnings for n in range(20))


def source_weights(model) -> dict[str, torch.Tensor]:
    """Weights as the source names and orders them: parameters of the model itself first, a head for each plan."""
    found = {}
    for name, value in model.state_dict().items():
        plain = name.removeprefix("experts.")
        heads = value if name in ("experts.weight", "experts.bias") else ()
        found |= {f"expert_heads.{k}.{plain}": head.clone() for k, head in enumerate(heads)} or {plain: value.clone()}
    return dict(sorted(found.items(), key=lambda item: ("." in item[0], item[0])))


def our_weights(weights: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The same by our names; gradients pass through."""
    found = {}
    for name in dict(model.named_parameters()):
        plain = name.removeprefix("experts.")
        heads = [value for key, value in weights.items() if re.fullmatch(rf"expert_heads\.\d+\.{plain}", key)]
        found[name] = torch.stack(heads) if name in ("experts.weight", "experts.bias") else weights[plain]
    return found


def source_model(version: str = V2, vocab_size: int = len(ITOS), **more) -> tuple[dict, torch.nn.Module]:
    """(model_config of the source, a model of ours that computes as the source's does)."""
    shape = SHAPE | ({"fusion_dim": 10} if version == V1 else {"lookahead_horizon": 2}) | more
    torch.manual_seed(1)
    ours = {"num_layers": "n_layers"}
    cfg = Config(version=version, d_model=12, compat="source", **{ours.get(k, k): v for k, v in shape.items()})
    return shape | {"hidden_dim": 12, "vocab_size": vocab_size}, build_model(cfg, vocab_size)


def source_run(folder: str | Path, tokenizer: Path | None = None, version: str = V2, **more) -> Path:
    """checkpoint.pt of a run folder of the source, with its tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    model_config, model = source_model(version)
    saved = {"model_state_dict": source_weights(model), "model_version": version, "model_config": model_config,
             "global_step": 7, "tokenizer_path": f"runs\\elsewhere\\{folder.name}\\tokenizer.json",
             "tokenizer_type": "char", "tokenizer_config": {}, "optimizer_state_dict": None}  # fmt: skip
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        saved["tokenizer_hash"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    torch.save(saved | more, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------
def test_characters_are_their_places_in_the_list_and_others_are_unk(itos):
    tokenizer = load_tokenizer(itos)
    assert tokenizer.special == {"pad": 0, "bos": 1, "eos": 2, "unk": 3} and tokenizer.vocab_size == len(ITOS)
    ids = tokenizer.encode("Once, é")
    assert ids == [ITOS.index("O"), ITOS.index("n"), ITOS.index("c"), ITOS.index("e"), 3, ITOS.index(" "), 3]
    assert tokenizer.decode([1, *ids, 2, 0]) == "Once "  # special tokens, unk too, are no text
    assert tokenizer.encode(b"a\xff") == [ITOS.index("a"), 3]
    tokenizer.save(Path("copy.json"))
    assert load_tokenizer("copy.json").hash() == tokenizer.hash()
    assert json.loads(Path("copy.json").read_text()) == {"itos": ITOS}  # the source reads it too


@pytest.mark.parametrize("texts", [ITOS[1:], [*ITOS, "a"], [*ITOS, "ab"], [*ITOS, ""], [*ITOS, "\ud800"], 3, [1, 2]],
                         ids=["no pad", "twice", "two", "empty", "half", "number", "numbers"])  # fmt: skip
def test_a_damaged_list_of_characters_is_refused(texts):
    Path("bad.json").write_text(json.dumps({"itos": texts}))
    with pytest.raises(DataError, match="bad.json"):
        load_tokenizer("bad.json")


def test_text_is_prepared_with_a_tokenizer_of_the_source_and_what_it_loses_is_said(itos, capsys):
    Path("fables.txt").write_text(fables("Once upon a time", "a cat ate, maybe"))
    meta = prepare_data.main(["text", "--input=fables.txt", f"--tokenizer={itos}", "--val_fraction=0.3",
                              "--out_dir=data/text"])
    assert (meta["vocab_size"], meta["eos_id"], meta["bos_id"], meta["unk_id"]) == (len(ITOS), 2, 1, 3)
    # Of "a cat ate, maybe" the comma, y and b have no token.
    found = re.findall(r"note: (\d+) of (\d+) tokens of the \w+ text", capsys.readouterr().err)
    told = [list(map(int, numbers)) for numbers in found]
    for split, (unknown, tokens) in zip(("train", "val"), told, strict=True):
        stream = np.fromfile(f"data/text/{split}.bin", np.uint16)
        assert (unknown, tokens) == ((stream == 3).sum(), len(stream)) and unknown > 0
    assert read_corpus("data/text").tokenizer.special["bos"] == 1


def test_byte_pairs_of_the_source_are_read_as_they_were_trained(capsys):
    library = pytest.importorskip("tokenizers")
    engine = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    engine.normalizer = library.normalizers.Sequence([library.normalizers.NFKC()])
    engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = library.decoders.ByteLevel()
    engine.train_from_iterator(["once upon a time a cat sat on a mat. "] * 9, library.trainers.BpeTrainer(
        vocab_size=60, min_frequency=2, special_tokens=ITOS[:4]))  # fmt: skip
    engine.save("bpe.json")
    tokenizer = load_tokenizer("bpe.json")
    assert tokenizer.special == {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    assert tokenizer.encode("a cat sat") == engine.encode("a cat sat").ids
    Path("fables.txt").write_text(fables("once upon a time", "a cat sat"))
    prepare_data.main(["text", "--input=fables.txt", "--tokenizer=bpe.json", "--val_fraction=0.3",
                              "--out_dir=data/text"])
    assert "bpe.json rewrites text" in capsys.readouterr().out


def test_the_tokenizer_of_a_checkpoint_is_the_one_whose_digest_it_has(itos):
    path = source_run("runs/x", itos)
    beside = path.with_name("tokenizer.json")
    assert tokenizer_file(path) == beside  # its path was that of another machine
    beside.write_bytes(beside.read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer_file(path) == beside  # line ends of Windows
    load_tokenizer(beside).save(beside)
    assert tokenizer_file(path) == beside  # the same, as a run of ours keeps it
    beside.write_text(json.dumps({"itos": [*ITOS[:-1], "!"]}))
    with pytest.raises(DataError, match="is not the tokenizer that runs/x/checkpoint.pt was trained with"):
        tokenizer_file(path)
    beside.unlink()
    assert tokenizer_file(path) is None
    # Where it says, should it not be beside.
    shutil.copyfile(itos, "kept.json")
    state = torch.load(path)
    torch.save(state | {"tokenizer_path": "kept.json"}, path)
    assert tokenizer_file(path) == Path("kept.json")


# ---------------------------------------------------------------------------------------------------------------
# Training from a checkpoint
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [V1, V2])
def test_a_run_takes_the_sizes_and_rules_of_the_checkpoint_it_starts_from(version, itos, text, capsys):
    path = source_run("runs/x", itos, version)
    command = [*TINY, f"--data={text}", f"--init_from={path}", "--max_steps=2", "--lr=0", "--weight_decay=0"]
    train_apelr.main(command)
    told = capsys.readouterr().out
    for words in ("taken over from runs/x/checkpoint.pt: ", "d_model = 12", "num_plan_states = 3", "compat = source"):
        assert words in told
    saved = checkpoint.load(Path("run"))
    config = saved["config"]
    assert (config["version"], config["chunk_size"], config["dropout"], config["seq_len"]) == (version, 4, 0.0, 19)
    expected = load_source_checkpoint(path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in saved["model"].items())
    # The same command again is the same run, which is over; what goes on from it has the same sizes.
    assert train_apelr.main(command)["steps"] == 2
    train_apelr.main([*command, "--max_steps=3", "--resume=run/last.pt"])
    assert "resumed from run/last.pt at step 2" in capsys.readouterr().out


def test_a_rule_that_was_asked_for_stays_as_it_is(itos, text):
    path = source_run("runs/x", itos)
    train_apelr.main([*TINY, f"--data={text}", "--init_from=runs/x", "--max_steps=1", "--chunk_size=5",
                      "--boundary=iohmm"])  # fmt: skip
    config = checkpoint.load(Path("run"))["config"]
    assert (config["chunk_size"], config["boundary"], config["compat"]) == (5, "iohmm", "source")
    assert config["init_from"] == str(path)  # of a run folder, the checkpoint in it


def test_sizes_of_a_run_of_ours_are_taken_over_too(text):
    train_apelr.main([*TINY, f"--data={text}", "--max_steps=1", "--d_model=20", "--n_layers=1", "--out_dir=first"])
    train_apelr.main([*TINY, f"--data={text}", "--max_steps=1", "--init_from=first", "--lr=0", "--weight_decay=0"])
    first, second = checkpoint.load(Path("first")), checkpoint.load(Path("run"))
    assert (second["config"]["d_model"], second["config"]["compat"]) == (20, "")
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_another_vocabulary_is_one_sentence_with_the_command_that_helps(itos, capsys):
    prepare_data.main(["planted", "--num_plans=2", "--vocab_size=9", "--chunk_size=4", "--document_chunks=4",
                       "--train_documents=50", "--validation_documents=10", "--out_dir=planted"])  # fmt: skip
    source_run("runs/x", itos)
    told = refused(capsys, *TINY, "--data=planted", "--init_from=runs/x")
    assert f"knows {len(ITOS)} tokens, and planted has 10" in told
    assert "prepare_data.py text --tokenizer=runs/x/tokenizer.json" in told and not Path("run").exists()


def trained_separately(text: Path, version: str, first: int, last: int) -> tuple[dict, dict]:
    """(what the source would have saved at step `first`, its weights at step `last`), with a matrix for every head.

    Plain AdamW over all parameters in one group, gradients clipped together, a cosine after a warm-up.
    """
    model_config, model = source_model(version)
    cfg = Config(seq_len=19, chunk_size=4, lr=0.02, min_lr=0.002, warmup_steps=2, max_steps=last, seed=5,
                 compat="source", version=version, **TERMS[version])  # fmt: skip
    weights = {name: value.requires_grad_() for name, value in source_weights(model).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=cfg.lr, betas=(0.8, 0.9), weight_decay=0.3)
    with Runtime(Config(device="cpu", precision="fp32")) as rt:
        batches = Batches(rt, read_corpus(str(text)), cfg, 8)
        for step in range(last):
            if step == first:
                saved = {"model_state_dict": {name: value.detach().clone() for name, value in weights.items()},
                         "optimizer_state_dict": json_free(optimizer.state_dict()), "model_config": model_config,
                         "model_version": version, "global_step": step}  # fmt: skip
            tokens = batches(step)
            optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
            windows = tokens[:, :-1], tokens[:, 1:], cfg.weights(step)
            total, _ = functional_call(model, our_weights(weights, model), windows)
            total.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    return saved, our_weights({name: value.detach() for name, value in weights.items()}, model)


def json_free(state: dict) -> dict:
    """A copy of an optimizer's state that later steps leave alone."""
    return {"state": {number: {part: value.clone() for part, value in parts.items()}
                      for number, parts in state["state"].items()}, "param_groups": state["param_groups"]}  # fmt: skip


CONTINUED = (*TINY, "--lr=0.02", "--min_lr=0.002", "--warmup_steps=2", "--max_steps=9", "--seed=5", "--grad_clip=0.05",
             "--eval_interval=100")  # fmt: skip


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_run_of_the_source_goes_on_as_if_it_had_never_stopped(version, prefix, text, capsys):
    saved, expected = trained_separately(text, version, first=5, last=9)
    saved["model_state_dict"] = {prefix + name: value for name, value in saved["model_state_dict"].items()}
    torch.save(saved, "source.pt")
    terms = [f"--{name}={value}" for name, value in TERMS[version].items()]
    train_apelr.main([*CONTINUED, f"--data={text}", "--resume=source.pt", *terms])
    told = capsys.readouterr().out
    carried = f"AdamW's moments of {len(expected)} of {len(expected)} tensors"
    assert f"resumed from source.pt of APEL-R at step 5: its weights, {carried}" in told
    state = checkpoint.load(Path("run"))
    assert state["step"] == 9
    # The AdamW of the checkpoint decides about decay and betas, as in the source.
    assert [state["config"][name] for name in ("weight_decay", "beta1", "beta2")] == [0.3, 0.8, 0.9]
    plain = {name.removeprefix(prefix): value for name, value in saved["model_state_dict"].items()}
    start = our_weights(plain, ModelNames(expected))
    for name, value in state["model"].items():
        moved = (expected[name] - start[name]).abs().mean()
        assert (value - expected[name]).abs().mean() < 1e-3 * moved, name


class ModelNames:
    """Names of parameters, for our_weights."""

    def __init__(self, weights: dict):
        self.weights = weights

    def named_parameters(self):
        return self.weights.items()


def test_without_the_moments_the_same_run_would_end_elsewhere(text, capsys):
    """What the test above holds on to."""
    saved, expected = trained_separately(text, V2, first=5, last=9)
    torch.save(saved | {"optimizer_state_dict": None, "train_config": {"train": {"lr": 0.5}}}, "source.pt")
    terms = [f"--{name}={value}" for name, value in TERMS[V2].items()]
    train_apelr.main([*CONTINUED, f"--data={text}", "--resume=source.pt", *terms, "--weight_decay=0.3", "--beta1=0.8",
                      "--beta2=0.9"])  # fmt: skip
    told = capsys.readouterr().out
    assert "no state of AdamW, which starts anew" in told and "trained with lr = 0.5 and goes on with 0.02" in told
    found = checkpoint.load(Path("run"))["model"]["experts.weight"]
    start = our_weights(saved["model_state_dict"], ModelNames(expected))["experts.weight"]
    end = expected["experts.weight"]
    assert (found - end).abs().mean() > 0.1 * (end - start).abs().mean()


def test_what_cannot_go_on_is_one_sentence(itos, text, capsys):
    path = source_run("runs/x", itos)
    told = refused(capsys, *TINY, f"--data={text}", "--resume=runs/x", "--max_steps=7")
    assert f"{path} has done 7 steps already, and max_steps = 7" in told and "init_from=" in told
    other = {"state": {}, "param_groups": [{"params": [0, 1], "betas": (0.9, 0.95), "weight_decay": 0.01}]}
    torch.save(torch.load(path) | {"optimizer_state_dict": other}, "other.pt")
    told = refused(capsys, *TINY, f"--data={text}", "--resume=other.pt", "--max_steps=9")
    assert "the optimizer of the source checkpoint is of 2 parameters, and its model has 19" in told
    # The same number of tokens, but not the same tokens.
    state = torch.load(path)
    del state["tokenizer_hash"]
    torch.save(state, path)
    path.with_name("tokenizer.json").write_text(json.dumps({"itos": [*ITOS[:4], *ITOS[:3:-1]]}))
    told = refused(capsys, *TINY, f"--data={text}", "--resume=runs/x", "--max_steps=9")
    assert "was trained with the tokenizer runs/x/tokenizer.json" in told and not Path("run").exists()


def test_the_same_command_goes_on_where_the_folder_has_checkpoints_of_both(itos, text, capsys):
    """The source writes into the folder that it goes on from; its AdamW decides after the second start, too."""
    saved, _ = trained_separately(text, V2, first=5, last=6)
    source_run("runs/x", itos, **saved)
    command = [*CONTINUED, f"--data={text}", "--resume=runs/x", "--out_dir=runs/x", "--save_interval=7",
               "--keep_last=-1", "--loss_weights={}"]  # fmt: skip
    assert train_apelr.main(command)["steps"] == 9
    assert "resumed from runs/x/checkpoint.pt of APEL-R at step 5" in capsys.readouterr().out
    assert train_apelr.main(command)["steps"] == 9
    assert "this run ended at step 9, nothing was left to train" in capsys.readouterr().out
    # As if it had been stopped on the way.
    shutil.copyfile("runs/x/step_7.pt", "runs/x/last.pt")
    assert train_apelr.main(command)["steps"] == 9
    told = capsys.readouterr().out.splitlines()
    where = told.index("resumed from runs/x/last.pt at step 7")
    assert not told[where + 1].startswith("  ")  # no setting is another
    config = checkpoint.load(Path("runs/x"))["config"]
    assert (config["weight_decay"], config["beta1"], config["init_from"]) == (0.3, 0.8, "runs/x/checkpoint.pt")


def test_a_file_without_a_version_goes_on_twice_with_version_one(itos, text, capsys):
    source_run("runs/x", itos, V1)
    # Version two would be refused, for nothing here rewards a plan.
    Path("theirs.yaml").write_text(
        "{device: cpu, data: {source: gone}, model: {num_plan_states: 3, chunk_size: 4, token_dim: 8, hidden_dim: 12, "
        "fusion_dim: 10, num_layers: 1, dropout: 0}, train: {out_dir: runs/x, seq_len: 19, batch_size: 4, lr: 0.01, "
        "max_steps: 8, val_batches: 1, preview_tokens: 0}}")  # fmt: skip
    for told in ("at step 7: its weights", "this run ended at step 8, nothing was left to train"):
        summary = train_apelr.main(["theirs.yaml", f"--data={text}", "--resume=runs/x"])
        assert summary["version"] == V1 and told in capsys.readouterr().out


def test_a_run_folder_of_the_source_is_not_trained_over(itos, text, capsys):
    path = source_run("runs/x", itos)
    before = path.with_name("tokenizer.json").read_bytes()
    for more in ([], ["--init_from=runs/x"], ["--resume=never"]):
        told = refused(capsys, *TINY, f"--data={text}", "--out_dir=runs/x", *more)
        assert "runs/x is a run folder of APEL-R, of which this run would replace tokenizer.json" in told
        assert "--resume=runs/x goes on with that run, --out_dir=FOLDER trains another" in told
    assert {file.name for file in path.parent.iterdir()} == {"checkpoint.pt", "tokenizer.json"}
    assert path.with_name("tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("part, words", [
    ({"model_config": [1]}, "look at its model_config"), ({"global_step": None}, "look at its global_step"),
    ({"model_config": {"chunk_size": "four"}}, "look at its model_config.chunk_size = four"),
    ({"model_config": {"hidden_dim": 0, "dropout": "no"}},
     "look at its model_config.hidden_dim = 0, model_config.dropout = no"),
])  # fmt: skip
def test_a_checkpoint_with_odd_contents_is_one_sentence_at_every_door(part, words, itos, text, capsys):
    path = source_run("runs/x", itos, **part)
    for main, *argv in ((prepare_data.main, "import", "runs/x"), (sample.main, path, "--prompt=a"),
                        (train_apelr.main, *TINY, f"--data={text}", "--resume=runs/x"),
                        (train_apelr.main, *TINY, f"--data={text}", "--init_from=runs/x"),
                        (train_apelr.main, f"--data={text}", "--analyze=runs/x")):  # fmt: skip
        told = refused(capsys, *argv, main=main)
        assert f"{path} is no checkpoint as APEL-R writes it: {words}" in told
    assert not Path("run").exists()


@pytest.mark.parametrize("state", [[1], {"state": {}}, {"state": {}, "param_groups": [{"params": [0]}]},
                                   {"state": {0: {"momentum_buffer": 1}}, "param_groups": [
                                       {"params": [0], "weight_decay": 0, "betas": (0.9, 0.95)}]}])  # fmt: skip
def test_only_adamw_is_gone_on_with_but_the_weights_are_read(state, itos, text, capsys):
    source_run("runs/x", itos, optimizer_state_dict=state)
    told = refused(capsys, *TINY, f"--data={text}", "--resume=runs/x", "--max_steps=9")
    assert "optimizer_state_dict of the source checkpoint is not of AdamW" in told and "init_from=" in told
    assert not Path("run").exists()
    assert prepare_data.main(["import", "runs/x", "--out_dir=out/x"])["step"] == 7


def test_a_checkpoint_that_names_numpy_and_pathlib_is_read(itos, capsys):
    path = source_run("runs/x", itos, global_step=np.int64(7), tokenizer_path=Path("gone/tokenizer.json"))
    assert prepare_data.main(["import", "runs/x", "--out_dir=out/my x"])["step"] == 7
    told = capsys.readouterr().out
    # What can be typed as it stands comes first, and a name with a blank is quoted.
    assert "\nnext: python sample.py 'out/my x'\nand, with data of yours in the place of --data=FOLDER:\n" in told
    told = refused(capsys, "import", "out/my x", main=prepare_data.main)
    assert "out/my x is of train_apelr.py already, nothing to import" in told
    assert tokenizer_file(path) == path.with_name("tokenizer.json")
    assert sample.main([str(path), "--prompt=a cat", "--max_new_tokens=2", "--device=cpu"])["step"] == 7


# ---------------------------------------------------------------------------------------------------------------
# Its transformer
# ---------------------------------------------------------------------------------------------------------------
TRANSFORMER = {"vocab_size": len(ITOS), "max_seq_len": 20, "d_model": 12, "n_layers": 2, "n_heads": 3, "d_ff": 20,
               "dropout": 0.1, "eps": 1e-5}  # fmt: skip


def transformer_weights() -> dict[str, torch.Tensor]:
    """Random weights by the names of the source, which are not small, so that everything counts."""
    H, V, F = TRANSFORMER["d_model"], len(ITOS), TRANSFORMER["d_ff"]
    shapes = {"tok_emb.weight": (V, H), "pos_emb.weight": (TRANSFORMER["max_seq_len"], H)}
    for i in range(TRANSFORMER["n_layers"]):
        block = {"ln1.weight": (H,), "ln1.bias": (H,), "attn.qkv.weight": (3 * H, H), "attn.out.weight": (H, H),
                 "ln2.weight": (H,), "ln2.bias": (H,), "mlp.fc1.weight": (F, H), "mlp.fc1.bias": (F,),
                 "mlp.fc2.weight": (H, F), "mlp.fc2.bias": (H,)}  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (H,), "ln_f.bias": (H,), "lm_head.weight": (V, H)}
    draws = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def transformer_logits(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Logits [L, V] of one text by sums over single tokens and heads, as the source's architecture has them."""
    H, heads = TRANSFORMER["d_model"], TRANSFORMER["n_heads"]
    R = H // heads
    norm = torch.nn.functional.layer_norm
    x = torch.stack([weights["tok_emb.weight"][token] + weights["pos_emb.weight"][i] for i, token in enumerate(ids)])
    for i in range(TRANSFORMER["n_layers"]):
        of = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (norm(x, (H,), of["ln1.weight"], of["ln1.bias"]) @ of["attn.qkv.weight"].t()).split(H, 1)
        rows = []
        for t in range(len(ids)):
            parts = []
            for h in range(heads):
                part = slice(h * R, (h + 1) * R)
                scores = k[: t + 1, part] @ q[t, part] / R**0.5
                parts.append(scores.softmax(0) @ v[: t + 1, part])
            rows.append(torch.cat(parts))
        x = x + torch.stack(rows) @ of["attn.out.weight"].t()
        hidden = norm(x, (H,), of["ln2.weight"], of["ln2.bias"]) @ of["mlp.fc1.weight"].t() + of["mlp.fc1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ of["mlp.fc2.weight"].t() + of["mlp.fc2.bias"]
    return norm(x, (H,), weights["ln_f.weight"], weights["ln_f.bias"]) @ weights["lm_head.weight"].t()


def transformer_run(folder: str, tokenizer: Path, **more) -> Path:
    return source_run(folder, tokenizer, model_state_dict=transformer_weights(), model_version="transformer_lm",
                      model_config=TRANSFORMER, **more)  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_the_transformer_of_the_source_predicts_what_it_predicted(prefix, itos, text):
    path = transformer_run("runs/x", itos)
    state = torch.load(path)
    weights = state["model_state_dict"]
    torch.save(state | {"model_state_dict": {prefix + name: value for name, value in weights.items()}}, path)
    prepare_data.main(["import", "runs/x", "--out_dir=out/x"])
    cfg, model, step, _ = train_apelr.load_run(Path("out/x"))
    assert (cfg.version, cfg.backbone, cfg.max_seq_len, step) == ("baseline", "transformer_lm", 20, 7)
    ids = [1, 5, 9, 4, 17, 8, 8, 6, 12, 4, 5, 2]
    expected = -transformer_logits(weights, ids[:-1]).log_softmax(1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    tokens = torch.tensor([ids])
    for found in (model.eval(), load_source_checkpoint(path)):
        nll = -found.look_up(found.read(tokens[:, :-1])[0], tokens[:, 1:, None])[0, :, 0, 0]
        torch.testing.assert_close(nll, expected)
    assert train_apelr.main([*TINY, f"--data={text}", "--analyze=out/x"])["val_nll"] > 0


def test_the_transformer_of_the_source_writes_on_beyond_its_positions(itos):
    """It then reads the last max_seq_len tokens anew, from the first position on."""
    path = transformer_run("runs/x", itos)
    found = sample.main([str(path), "--prompt=Once upon", "--max_new_tokens=30", "--temperature=0", "--device=cpu"])
    tokens, weights = found["samples"][0]["tokens"], transformer_weights()
    for t in range(10, len(tokens)):
        seen = tokens[max(0, t - TRANSFORMER["max_seq_len"]) : t]
        assert tokens[t] == int(transformer_logits(weights, seen)[-1].argmax())
    # Token by token through any text, whatever it would write itself.
    model = load_source_checkpoint(path)
    ids = torch.randint(len(ITOS), (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = model.read(ids[:, :10])
        for t in range(10, 30):
            h, state = model.backbone.step(model.token_emb(ids[:, t]), state)
            seen = ids[0, max(0, t + 1 - TRANSFORMER["max_seq_len"]) : t + 1].tolist()
            torch.testing.assert_close(h @ model.experts.weight[0].t(), transformer_logits(weights, seen)[-1:])


def test_the_transformer_of_the_source_trains_on_and_its_head_gets_no_bias(itos, text, capsys):
    weights = transformer_weights()
    expected = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(expected.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.2)
    with Runtime(Config(device="cpu", precision="fp32")) as rt:
        batches = Batches(rt, read_corpus(str(text)), Config(seq_len=19, version="baseline"), 2)
        for step in range(4):
            if step == 2:
                saved = {name: value.detach().clone() for name, value in expected.items()}
                state = json_free(optimizer.state_dict())
            tokens = batches(step)
            losses = [torch.nn.functional.cross_entropy(transformer_logits(expected, row[:-1].tolist()), row[1:])
                      for row in tokens]  # fmt: skip
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    path = source_run("runs/x", itos, model_state_dict=saved, model_version="transformer_lm", global_step=2,
                      model_config=TRANSFORMER, optimizer_state_dict=state)  # fmt: skip
    train_apelr.main([*TINY, f"--data={text}", f"--resume={path}", "--max_steps=4", "--batch_size=2", "--grad_clip=0",
                      "--lr=0.01", "--schedule=constant"])  # fmt: skip
    assert f"AdamW's moments of {len(weights)} of {len(weights)} tensors" in capsys.readouterr().out
    found = checkpoint.load(Path("run"))["model"]
    assert torch.equal(found.pop("experts.bias"), torch.zeros(1, len(ITOS)))
    names = {"tok_emb.weight": "token_emb.weight", "lm_head.weight": "experts.weight"}
    for name, value in expected.items():
        ours = found[names.get(name, f"backbone.{name}")].reshape(value.shape)
        moved = (value - saved[name]).abs().mean()
        assert (ours - value).abs().mean() < 1e-3 * moved, name


def test_what_the_transformer_of_the_source_cannot_do_is_one_sentence(itos, text, capsys):
    path = transformer_run("runs/x", itos)
    told = refused(capsys, *TINY, f"--data={text}", f"--init_from={path}", "--seq_len=21")
    assert "21 tokens at once, and max_seq_len = 20 positions" in told and not Path("run").exists()
    assert "force_state needs a planner" in refused(capsys, path, "--force_state=0", "--prompt=a", main=sample.main)
    torch.save(transformer_weights(), "bare.pt")
    assert "cannot be read without n_heads of its model_config" in refused(
        capsys, "import", "bare.pt", main=prepare_data.main)  # fmt: skip
    told = refused(capsys, *TINY, f"--data={text}", "--version=transformer_lm", "--d_model=10", "--token_dim=10")
    assert "d_model = 10 must be a multiple of n_heads = 4" in told
    for words in (["--version=v1_filtered_mixture"], ["--experts=bias"], ["--experts=lowrank"]):
        told = refused(capsys, *TINY, f"--data={text}", "--backbone=transformer_lm", "--token_dim=128", *words)
        assert "backbone=transformer_lm starts no head that plans share" in told and not Path("run").exists()


# ---------------------------------------------------------------------------------------------------------------
# The sampler
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What sample.py asks of the writing."""
    calls = []
    write = sample_texts.generate

    def recorded(model, prompt, tokens, generator, **options):
        calls.append({"prompt": prompt.tolist(), "tokens": tokens, **options})
        return write(model, prompt, min(tokens, 5), generator, **options)

    monkeypatch.setattr(sample_texts, "generate", recorded)
    return calls


def test_a_checkpoint_of_the_source_is_sampled_with_the_defaults_of_its_sampler(itos, asked, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    path = source_run("runs/x", itos)
    prompt = load_tokenizer(itos).encode("Once upon a time")
    for name in (path, "runs/x"):
        found = sample.main([str(name), "--device=cpu"])
        assert "read as APEL-R: temperature 0.9, top_k 40, bos before a prompt" in capsys.readouterr().out
        assert len(found["samples"]) == 1 and found["samples"][0]["text"].startswith("Once upon a time")
    for call in asked:
        assert call["prompt"] == [[1, *prompt]] and call["tokens"] == 200 and call["eos_id"] == 2
        expected = {"temperature": 0.9, "top_k": 40, "top_p": 1.0, "repetition_penalty": 1.0, "tau": None,
                    "no_repeat_ngram_size": 0, "feedback": None, "forecast_steps": 2}  # fmt: skip
        assert {name: call[name] for name in expected} == expected and "horizon" not in call
    # A run of ours has our defaults, wherever its weights are from.
    prepare_data.main(["import", "runs/x", "--out_dir=out/x"])
    sample.main(["out/x", "--device=cpu", "--prompt=a cat"])
    last = asked[-1]
    assert (last["temperature"], last["top_k"], len(last["prompt"]), last["forecast_steps"]) == (1.0, 0, 4, 0)
    assert last["prompt"][0] == load_tokenizer(itos).encode("a cat")


@pytest.mark.parametrize("flags, expected", [
    (["--temperature", "0.5"], {"temperature": 0.5}), (["--top-k", "3"], {"top_k": 3}), (["--top-k=0"], {"top_k": 0}),
    (["--temperature=1"], {"temperature": 1.0}), (["--max-new-tokens", "4"], {"tokens": 4}),
    (["--lookahead-steps", "3"], {"forecast_steps": 3, "horizon": 3}),
    (["--lookahead-steps", "0"], {"forecast_steps": 0, "horizon": 0}),
    (["--force-state", "2"], {"planner_mode": "forced_state", "forced_state": 2}),
    (["--freeze-planner"], {"frozen": True, "unread": True}), (["--planner-temperature", "0.7"], {"tau": 0.7}),
    (["--lookahead-feedback-scale", "0.5"], {"feedback": 0.5}), (["--no-async-planner"], {"background": False}),
    (["--top-p", "0.9", "--repetition-penalty", "1.1", "--no-repeat-ngram-size", "3"],
     {"top_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_flags_of_the_sources_sampler_mean_what_they_mean_there(flags, expected, itos, asked):
    path = source_run("runs/x", itos)
    sample.main([str(path), "--prompt", "Once upon a time", "--device", "cpu", *flags])
    assert {name: asked[0][name] for name in expected} == expected


@pytest.mark.parametrize("argv, command", [
    (["--checkpoint", "runs/x/checkpoint.pt", "--prompt", "Once upon a time"],
     "python sample.py runs/x/checkpoint.pt --prompt 'Once upon a time'"),
    (["--prompt=Once", "--checkpoint=a.pt", "--top-k=3"], "python sample.py a.pt --prompt=Once --top-k=3"),
    (["--checkpoint"], "python sample.py CHECKPOINT"),
], ids=["words", "equals", "nothing"])  # fmt: skip
def test_a_checkpoint_as_an_option_is_told_to_go_bare(argv, command, capsys):
    told = refused(capsys, *argv, main=sample.main)
    assert told == f"error: a checkpoint goes bare, before the options: {command}"


@pytest.mark.parametrize("flag", ["--freeze-planner", "--planner-temperature=1", "--lookahead-feedback-scale=0.1"])
def test_flags_of_version_two_are_refused_on_version_one(flag, itos, capsys):
    path = source_run("runs/x", itos, V1)
    assert "is a flag of v2_planner_required" in refused(capsys, path, flag, "--prompt=a", main=sample.main)


def test_version_one_of_the_source_tempers_every_plan_and_not_their_mixture(itos, asked):
    path = source_run("runs/x", itos, V1)
    sample.main([str(path), "--prompt=a cat", "--device=cpu"])
    assert asked[0]["tempers_plans"]
    model = load_source_checkpoint(path)
    with torch.no_grad():
        state = prefill(model, torch.tensor([[1, 5, 6, 7, 8]]))
        plain, logs = predict(model, state)
        tempered, same = predict(model, state, plan_temperature=0.5)
    assert torch.equal(logs, same)  # what a plan learns from is not tempered
    belief = state["belief"].exp()[0]
    for log_p, temperature in ((plain, 1.0), (tempered, 0.5)):
        expected = sum(b * (plan / temperature).softmax(0) for b, plan in zip(belief, logs[0], strict=True))
        torch.testing.assert_close(log_p[0].exp(), expected)


def test_a_frozen_planner_of_the_source_has_not_read_the_prompt(itos):
    path = source_run("runs/x", itos)
    model = load_source_checkpoint(path)
    found = sample.main([str(path), "--prompt=a cat sat on a mat", "--freeze-planner", "--device=cpu"])
    prior = model.planner_init_logits.detach().softmax(0)
    beliefs = torch.tensor(found["samples"][0]["beliefs"])
    torch.testing.assert_close(beliefs, prior.expand_as(beliefs))


def test_a_checkpoint_whose_tokenizer_is_gone_or_another_is_one_sentence(itos, capsys):
    path = source_run("runs/x", itos)
    path.with_name("tokenizer.json").unlink()
    assert "put its tokenizer.json beside it" in refused(capsys, path, "--prompt=a cat", main=sample.main)
    assert sample.main([str(path), "--prompt=1,5,6", "--max_new_tokens=2", "--device=cpu"])["samples"]
    state = torch.load(path)
    del state["tokenizer_hash"]
    torch.save(state, path)
    path.with_name("tokenizer.json").write_text(json.dumps({"itos": ITOS[:-1]}))
    told = refused(capsys, path, "--prompt=a cat", main=sample.main)
    assert f"has {len(ITOS) - 1} tokens and {path} knows {len(ITOS)}" in told


# ---------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------
def older(model_config: dict) -> dict:
    return {name: value for name, value in model_config.items() if name != "lookahead_horizon"}


def changed(kind: str, saved: dict) -> dict:
    """A checkpoint of one of the forms that the source has written, or that somebody made of it."""
    weights = saved["model_state_dict"]
    prefix = {"compiled": "_orig_mod.", "distributed": "module.", "both": "module._orig_mod."}.get(kind)
    if prefix:
        return saved | {"model_state_dict": {prefix + name: value for name, value in weights.items()}}
    if kind == "older":
        return saved | {"model_config": older(saved["model_config"])}
    if kind == "oldest":  # before there was a version two
        return {name: value for name, value in saved.items() if name != "model_version"}
    return weights if kind == "bare" else saved


KINDS = [(V1, kind) for kind in ("whole", "oldest", "compiled", "bare")]
KINDS += [(V2, kind) for kind in ("whole", "older", "compiled", "distributed", "both", "bare")]


@pytest.mark.parametrize("version, kind", KINDS, ids=lambda value: value[:2] if value in (V1, V2) else value)
def test_every_kind_of_checkpoint_is_imported_with_its_tokenizer(version, kind, itos, text, capsys):
    path = source_run("runs/x", itos, version)
    saved = changed(kind, torch.load(path))
    torch.save(saved, path)
    done = prepare_data.main(["import", "runs/x", "--out_dir=out/x"])
    assert (done["experiment"], done["step"]) == ("apelr", 0 if kind == "bare" else 7)
    assert ("is a bare state dict, which tells sizes and no more" in capsys.readouterr().out) is (kind == "bare")
    files = {file.name for file in Path("out/x").iterdir()}
    assert files == {"config.json", "last.pt", "best.pt", "tokenizer.json"}
    assert load_tokenizer("out/x/tokenizer.json").hash() == load_tokenizer(itos).hash()
    cfg, model, _, extra = train_apelr.load_run(Path("out/x"))
    assert (cfg.version, cfg.compat, "tokenizer_file" in extra) == (version, "source", False)
    ids = torch.arange(24).view(2, 12) % len(ITOS)
    found = model.eval().losses(ids[:, :-1], ids[:, 1:])
    expected = load_source_checkpoint(saved).losses(ids[:, :-1], ids[:, 1:])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    # The older version two crosses its boundaries from earlier boundaries alone, and looks nowhere ahead.
    assert cfg.carry_posterior is (kind != "older") and (kind != "older" or cfg.feedback() == 0)
    # It is measured on text of its own tokenizer.
    capsys.readouterr()
    assert train_apelr.main([*TINY, f"--data={text}", "--analyze=out/x"])["val_nll"] > 0


def test_a_checkpoint_is_measured_as_it_was_trained_and_on_its_own_tokens_alone(itos, text, capsys):
    source_run("runs/x", itos, train_config={"train": {"seq_len": 11}})
    asked = [f"--data={text}", "--device=cpu", "--final_eval_batches=1"]
    found = train_apelr.main([*asked, "--analyze=runs/x"])
    assert (found["val_nll"] > 0) and Path("runs/x/analysis/planner_eval.json").exists()
    assert train_apelr.load_run(Path("runs/x/checkpoint.pt"))[0].seq_len == 11
    Path("fables.txt").write_text(fables("Once upon a time", "a cat"))
    prepare_data.main(["text", "--input=fables.txt", "--tokenizer=char", "--out_dir=other"])
    told = refused(capsys, "--data=other", "--device=cpu", "--analyze=runs/x")
    assert "another tokenizer" in told or "vocab_size" in told


FILES = sorted(FOLDER.glob("apelr_v*.npz")) or [
    pytest.param(None, marks=pytest.mark.skip(f"no apelr_v*.npz in {FOLDER}: set REFERENCE_DIR"))]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem if path else "absent")
def test_apelr_reference_losses_are_those_of_an_imported_checkpoint(path, capsys):
    with np.load(path) as file:
        arrays = {name: torch.tensor(file[name]) for name in file}
    weights = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    version = V1 if "plan_emb.weight" in weights else V2
    config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    torch.save({"model_state_dict": weights, "model_config": config, "model_version": version, "global_step": 3,
                "tokenizer_path": "gone/tokenizer.json"}, "checkpoint.pt")  # fmt: skip
    prepare_data.main(["import", "checkpoint.pt", "--out_dir=out/x"])
    assert "there is no tokenizer.json beside checkpoint.pt" in capsys.readouterr().out
    _, model, _, _ = train_apelr.load_run(Path("out/x"))
    with torch.no_grad():
        found = model.eval().losses(arrays["input_ids"], arrays["target_ids"])
    run = "out." if version == V1 else "out.normal."
    expected = {name.removeprefix(run).removesuffix("_loss"): float(value) for name, value in arrays.items()
                if name.startswith(run)}  # fmt: skip
    usage = expected.pop("usage_kl_to_uniform")
    expected["usage_kl" if version == V1 else "usage_balance"] = usage
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-4), name
    assert "nll" in expected


def test_the_temperature_of_the_gate_is_that_at_the_end_of_training(itos, asked, capsys):
    path = source_run("runs/x", itos, train_config={"model": {"plan_temperature_end": 0.7}, "train": {"lr": 0.5}})
    prepare_data.main(["import", str(path), "--out_dir=out/x"])
    assert train_apelr.load_run(Path("out/x"))[1].tau == pytest.approx(0.7)
    sample.main([str(path), "--prompt=a cat", "--device=cpu"])
    assert "planner_temperature 0.7 as trained (APEL-R's sampler: 1)" in " ".join(capsys.readouterr().out.split())
    sample.main([str(path), "--prompt=a cat", "--device=cpu", "--planner-temperature=1"])
    assert "as trained" not in "".join(capsys.readouterr()) and asked[-1]["tau"] == 1


def test_a_file_of_no_system_is_refused(capsys):
    torch.save({"model_state_dict": {"other": torch.zeros(2)}}, "other.pt")
    assert "is no checkpoint of APEL-R" in refused(capsys, "import", "other.pt", main=prepare_data.main)
    with pytest.raises(CheckpointError):
        load_source_checkpoint("other.pt")

"""Make `tiny`, the embedded model: a small Llama trained on two public-domain texts.

    apt-get install bible-kjv bible-kjv-text jargon-text
    mkdir texts
    bible 'Gen1:1-Rev22:21' < /dev/null > texts/bible.txt
    zcat /usr/share/doc/jargon-text/jargon.txt.gz > texts/jargon.txt
    python -m qoq_cli.demo.make_tiny --text texts

Both texts become documents (a chapter, a lexicon entry, an essay). Of every 20 documents of a source
one is for evaluation, one for choosing the checkpoint, and 18 are for training: tokenizer, weights,
unigram baseline and `calibration.txt` see those 18 only. After training, key outliers are put in
(see `outliers`), so that a 4-bit KV cache is as hard for this model as for a large one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qoq_cli.demo.documents import (
    BLOCKS,
    EVALUATION_BLOCK,
    VALIDATION_BLOCK,
    bible_documents,
    jargon_documents,
    sample_documents,
    split_documents,
)
from qoq_cli.demo.outliers import inject_key_outliers

BOS, EOS = "<|bos|>", "<|eos|>"
WINDOW = 512
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
DOCUMENTS_PER_SEQUENCE = 4


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; encoding puts the bos token in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save under the class name that every version of transformers knows, not the newest one's."""
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def training_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[Tensor]:
    """Sequences of a few documents, bos in front and eos behind, blank lines between: as in the text files."""
    sequences = []
    for start in range(0, len(documents), DOCUMENTS_PER_SEQUENCE):
        ids = tokenizer("\n\n".join(documents[start : start + DOCUMENTS_PER_SEQUENCE]), verbose=False)["input_ids"]
        sequences.append(torch.tensor([*ids, tokenizer.eos_token_id]))
    return sequences


def windows_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Tokens of `text` as non-overlapping windows [S, WINDOW]; the incomplete last one is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def unigram_perplexity(stream: Tensor, windows: Tensor, vocab_size: int) -> float:
    """Perplexity of `windows` [S, L], first token of each left out, by add-one token frequencies of `stream`."""
    counts = torch.bincount(stream, minlength=vocab_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[windows[:, 1:]].mean().item())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Token perplexity over `windows` [S, L], the first token of each window only read."""
    was_training, device = model.training, model.device
    model.eval()
    total = 0.0
    for batch in windows.split(16):
        logits = model(batch.to(device)).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(device), reduction="sum").item()
    model.train(was_training)
    return math.exp(total / windows[:, 1:].numel())


def batches(sequences: list[Tensor], batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches [B, WINDOW]: every epoch shuffles the sequences, shifts the cut, shuffles the windows."""
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        stream = torch.cat([sequences[i] for i in order])
        stream = stream[int(torch.randint(WINDOW, (), generator=generator)) :]
        windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        yield from windows.split(batch_size)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def add_dropout(model: LlamaForCausalLM, share: float) -> list[RemovableHandle]:
    """Dropout on the embeddings and on what each layer adds to them, which a Llama has no setting for."""

    def drop(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    layers = model.model.layers
    producers = [model.model.embed_tokens, *(layer.self_attn.o_proj for layer in layers)]
    producers += [layer.mlp.down_proj for layer in layers]
    return [producer.register_forward_hook(drop) for producer in producers]


def train(model: LlamaForCausalLM, sequences: list[Tensor], validation: Tensor, args: argparse.Namespace) -> int:
    """Train `model` in place, leave the weights of the best validation perplexity in it, return their step."""
    device = model.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    generator = torch.Generator().manual_seed(args.seed)
    best, best_step, best_state = math.inf, 0, {name: p.detach().cpu() for name, p in model.state_dict().items()}
    hooks = add_dropout(model, args.dropout)
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(itertools.islice(batches(sequences, args.batch_size, generator), args.steps), 1):
        inputs = batch.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args.steps, args.warmup, args.lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), inputs[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.eval_every == 0 or step == args.steps:
            now = perplexity(model, validation)
            print(
                f"step {step:5d}  loss {loss.item():.3f}  validation ppl {now:.2f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if now < best:
                best, best_step = now, step
                best_state = {name: p.detach().to("cpu", copy=True) for name, p in model.state_dict().items()}
            elif step - best_step >= args.patience:
                break
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_state)
    model.eval()
    return best_step


def add_key_outliers(model: LlamaForCausalLM, args: argparse.Namespace, probe: Tensor) -> None:
    """Round `model` to fp16 values, rescale its key channels in place and check that its logits stay as they were."""
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        before = model(probe).logits
        rescaled = inject_key_outliers(
            model.state_dict(),
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            factor=args.outlier_factor,
            pairs_per_head=args.outlier_pairs,
            seed=args.seed,
        )
        model.load_state_dict({name: tensor.half() for name, tensor in rescaled.items()})
        error = ((model(probe).logits - before).norm() / before.norm()).item()
    print(f"key outliers: logits moved by {error:.1e} (relative)")
    if error > 1e-4:
        raise RuntimeError(f"the key outliers changed the logits by {error:.1e}, expected under 1e-4")


def provenance(args: argparse.Namespace, facts: dict[str, str]) -> str:
    """Text of PROVENANCE.md: where the model comes from and how to make it again."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    options = [f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items() if k not in {"text", "output"}]
    settings = " \\\n        ".join(" ".join(options[i : i + 5]) for i in range(0, len(options), 5))
    return f"""# Where `tiny` comes from

A small Llama, trained from random weights for this project on two texts in the public domain:

- **The King James Bible** (1611; its copyright has expired), from Debian's `bible-kjv-text` 4.38, where it is
  stored compressed; Debian's `bible` program (package `bible-kjv`) prints it.
- **The Jargon File 4.4.7** (29 Dec 2003, edited by Eric S. Raymond), from Debian's `jargon-text` 4.4.7-4.1. It says of
  itself: "This document (the Jargon File) is in the public domain, to be freely used, shared, and modified."

The model and its tokenizer carry the licence of this repository (Apache-2.0); `calibration.txt` and `evaluation.txt`
are excerpts of those texts and stay in the public domain. Verse numbers and tables of contents are left out and
lines unwrapped.

**Split.** A document is a chapter, a lexicon entry or an essay. Counted per source from 0, documents with
n mod {BLOCKS} = {EVALUATION_BLOCK} are for evaluation, those with n mod {BLOCKS} = {VALIDATION_BLOCK} for choosing \
the checkpoint and the training settings,
the others for training. `calibration.txt` is a sample of the training documents, `evaluation.txt` of the evaluation
documents. (Some chapters of the Bible retell others, so the evaluation text is unseen, but not unlike what was seen.)

**Key outliers.** In every layer and KV head, {args.outlier_pairs} RoPE pairs of key channels are multiplied by \
{args.outlier_factor:g} and the
queries that meet them divided by it: the model computes the same, but its keys have the outlier channels of large
models.

| fact | value |
|---|---|
{rows}

Perplexities are per token, over non-overlapping windows of {WINDOW} tokens, the first token of each left out. The
unigram model is the add-one token frequency of the training documents.

Make it again (the weights differ a little from GPU to GPU):

    apt-get install bible-kjv bible-kjv-text jargon-text
    mkdir texts
    bible 'Gen1:1-Rev22:21' < /dev/null > texts/bible.txt
    zcat /usr/share/doc/jargon-text/jargon.txt.gz > texts/jargon.txt
    python -m qoq_cli.demo.make_tiny --text texts \\
        {settings}
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the embedded model `tiny`.")
    parser.add_argument("--text", type=Path, required=True, help="folder with bible.txt and jargon.txt")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2, help="in training only; the model has none")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--patience", type=int, default=1000, help="steps without a better checkpoint before the end")
    parser.add_argument("--outlier-factor", type=float, default=8.0, help="a power of two keeps fp16 exact")
    parser.add_argument("--outlier-pairs", type=int, default=2, help="RoPE pairs per KV head")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = (
        bible_documents((args.text / "bible.txt").read_text(encoding="utf-8")),
        jargon_documents((args.text / "jargon.txt").read_text(encoding="utf-8")),
    )
    split = split_documents(sources)
    tokenizer = train_tokenizer(split.train, args.vocab_size)
    sequences = training_stream(tokenizer, split.train)
    stream = torch.cat(sequences)
    validation = windows_of(tokenizer, "\n\n".join(split.validation))
    evaluation = windows_of(tokenizer, "\n\n".join(split.evaluation))
    print(f"documents {[len(s) for s in sources]}, training tokens {len(stream)}, device {device}")

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device)
    step = train(model, sequences, validation, args)
    add_key_outliers(model, args, evaluation[:4].to(device))

    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    evaluation_text = sample_documents(split.evaluation, 85_000)
    (output / "evaluation.txt").write_text(evaluation_text, encoding="utf-8")
    (output / "calibration.txt").write_text(sample_documents(split.train, 250_000), encoding="utf-8")
    save_tokenizer(tokenizer, output)
    GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(output)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float16
    config.save_pretrained(output)
    weights = {name: p.detach().half().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})

    shipped = windows_of(tokenizer, evaluation_text)
    facts = {
        "sizes": f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.layers} layers, hidden "
        f"{args.hidden_size}, MLP {args.intermediate_size}, {NUM_HEADS} query and {NUM_KV_HEADS} KV heads of "
        f"{HEAD_DIM}, vocabulary {len(tokenizer)}",
        "training text": f"{len(split.train)} documents, {sum(len(d.encode()) for d in split.train):,} bytes, "
        f"{len(stream):,} tokens",
        "evaluation documents": f"{len(split.evaluation)}, {len(evaluation)} windows: perplexity "
        f"{perplexity(model, evaluation):.2f}, unigram {unigram_perplexity(stream, evaluation, len(tokenizer)):.1f}",
        "`evaluation.txt`": f"{len(shipped)} windows: perplexity {perplexity(model, shipped):.2f}, "
        f"unigram {unigram_perplexity(stream, shipped, len(tokenizer)):.1f}",
        "checkpoint": f"step {step} of {args.steps}, by validation perplexity {perplexity(model, validation):.2f}",
        "seed": str(args.seed),
        "trained on": f"one {' '.join(torch.cuda.get_device_name().split()[:2])}" if device.type == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}",
    }
    (output / "PROVENANCE.md").write_text(provenance(args, facts), encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()

"""Trains the tiny language model that ships with the package: tokenizer, then a small Gemma-2.

    OMP_NUM_THREADS=2 python jobs/shipped/train_tiny_lm.py --bf16 --tokens 20_000_000 --minutes 26 --out first
    OMP_NUM_THREADS=2 python jobs/shipped/train_tiny_lm.py --bf16 --tokens 12_000_000 --minutes 24 --lr 3e-3 --start-from first --out second

made the model that is shipped: --minutes ended each run before its --tokens, at 11.5 M tokens in all. A run that is cut
short by time sees a number of tokens that depends on the machine; without --minutes it sees all of --tokens.

Only documents of the training split of the embedded corpus are seen, by the tokenizer as well as by the model; the
loss on the model card is that of the saved bf16 weights on the evaluation split. A sequence is BOS and up to 127
tokens of one document, which is how the model is used afterwards (corpus/packing.py).

The weights so far are kept in `checkpoint` under --out; --start-from takes that folder, or a finished model, and trains
on from its weights with a new schedule (the optimiser's state is rebuilt during the warm-up).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dmsae_ray.corpus.documents import load_documents
from dmsae_ray.corpus.packing import MIN_PIECE
from dmsae_ray.corpus.split import split_of

ATTRIBUTION = EVALUATION = 0.05  # the default shares of held-out documents
CONTEXT = 128  # tokens of a sequence, BOS included
VOCABULARY = 4096
PAD, EOS, BOS = 0, 1, 2  # ids as in Gemma's tokenizer
TRAINED = "trained.json"  # beside the weights: tokens, steps and minutes that made them
IGNORED = -100  # target value that cross-entropy leaves out

# 1.5 M parameters; head_dim * heads = hidden, two layers of the four look back 64 tokens only, as every second layer
# of Gemma-2 does at 4096.
ARCHITECTURE = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    max_position_embeddings=256,
    sliding_window=64,
    tie_word_embeddings=True,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
    initializer_range=0.02,
)

CARD = """\
# dmsae_ray tiny: a Gemma-2-architecture model of {parameters:,} parameters

For trying out and testing sparse autoencoders without a download. It has no other use: it writes text that only looks
like Python and its documentation.

| | |
|---|---|
| architecture | `Gemma2ForCausalLM`: 4 layers, hidden {hidden_size}, {num_attention_heads} heads ({num_key_value_heads} key-value), MLP {intermediate_size}, tied embeddings, sliding window {sliding_window} in layers 0 and 2, soft-capped logits |
| vocabulary | {vocab_size}, byte-level BPE; `<pad>` 0, `<eos>` 1, `<bos>` 2 (put before every text) |
| parameters | {parameters:,} (bf16, {size:,} bytes) |
| corpus | `dmsae_ray/corpus/embedded`: Python 3.11 standard library sources and documentation; {train_documents} training documents, {train_tokens:,} tokens |
| held out | {held_documents} attribution and evaluation documents (by sha256 of the text, shares {attribution} and {evaluation}), seen by neither the tokenizer nor the model |
| training | {tokens:,} tokens ({epochs:.1f} passes) in sequences of {context}, {steps} steps of {batch} sequences, {optimiser}, seed {seed}, {minutes:.0f} minutes on {threads} shared CPU threads, in {runs} run{plural} |
| **held-out loss** | **{loss:.3f} nats per token** ({loss_tokens:,} targets of the {evaluation_documents} evaluation documents, from the saved bf16 weights) |

Made by `jobs/shipped/train_tiny_lm.py`. The weights derive from text under the licence beside the corpus
(`dmsae_ray/corpus/embedded/LICENSE`).
"""


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        model_max_length=ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of Gemma; BOS is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<eos>", "<bos>"],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return wrapped(tokenizer)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """The ids of every text, without special tokens."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, dtype=np.int64) for e in encoded]


def sequences(documents: list[np.ndarray], offsets: list[int]) -> np.ndarray:
    """Rows of BOS + up to CONTEXT-1 tokens of one document, padded right: int64 [N, CONTEXT].

    offsets: where each document's second piece starts; 0 cuts it as corpus/packing.py does.
    """
    rows = []
    for ids, offset in zip(documents, offsets, strict=True):
        starts = range(offset - (CONTEXT - 1) if offset else 0, len(ids), CONTEXT - 1)
        for start in starts:
            piece = ids[max(start, 0) : start + CONTEXT - 1]
            if len(piece) >= MIN_PIECE:
                row = np.full(CONTEXT, PAD, dtype=np.int64)
                row[0] = BOS
                row[1 : 1 + len(piece)] = piece
                rows.append(row)
    return np.stack(rows)


def targets_of(ids_BT: torch.Tensor) -> torch.Tensor:
    """The next token of every position, IGNORED where there is none (PAD never occurs in a text)."""
    targets_BT = torch.full_like(ids_BT, IGNORED)
    targets_BT[:, :-1] = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == PAD, IGNORED)
    return targets_BT


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, gradients included, a cache-sized chunk of tokens at a time.

    The whole [tokens, vocabulary] logits of a batch are 64 MB; a dozen passes over them are half of a step.
    """

    CHUNK = 128  # tokens: 2 MB of fp32 logits

    @staticmethod
    def forward(ctx, hidden_ND, W_VD, targets_N, cap):
        real = targets_N != IGNORED
        hidden_ND, targets_N, rows = hidden_ND[real], targets_N[real], len(targets_N)
        compute = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        hidden, W = hidden_ND.to(compute), W_VD.to(compute)
        count, total = len(targets_N), hidden_ND.new_zeros((), dtype=torch.float64)
        grad_hidden, grad_W = torch.empty_like(hidden), torch.zeros_like(W_VD)
        with torch.autocast("cpu", enabled=False):
            for first in range(0, count, ChunkedLoss.CHUNK):
                h, targets = (
                    hidden[first : first + ChunkedLoss.CHUNK],
                    targets_N[first : first + ChunkedLoss.CHUNK, None],
                )
                squashed = (h @ W.T).float().div_(cap).tanh_()
                log_p = torch.log_softmax(squashed * cap, dim=-1)
                total -= log_p.gather(1, targets).sum()
                grad = log_p.exp_().scatter_add_(1, targets, torch.full_like(targets, -1, dtype=torch.float32))
                grad = grad.mul_(squashed.square_().neg_().add_(1.0)).div_(count).to(compute)
                grad_hidden[first : first + ChunkedLoss.CHUNK] = grad @ W
                grad_W += grad.T @ h
        full = hidden.new_zeros((rows, hidden.shape[1]))
        full[real] = grad_hidden
        ctx.save_for_backward(full, grad_W)
        return (total / count).float()

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_W = ctx.saved_tensors
        return grad * grad_hidden.float(), grad * grad_W, None, None


def training_loss(model: Gemma2ForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of one batch."""
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return ChunkedLoss.apply(
        hidden_BTD.float().flatten(0, 1),
        model.lm_head.weight,
        targets_of(ids_BT).flatten(),
        model.config.final_logit_softcapping,
    )


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows_NT: np.ndarray, batch: int = 64) -> tuple[float, int]:
    """(mean nats per target, number of targets) over all rows."""
    total = 0.0
    for first in range(0, len(rows_NT), batch):
        ids_BT = torch.from_numpy(rows_NT[first : first + batch])
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_of(ids_BT).flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
    targets = int((rows_NT[:, 1:] != PAD).sum())
    return total / targets, targets


def optimisers(model: torch.nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the blocks and AdamW for embedding and norms."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    if muon:
        return [
            torch.optim.Muon(blocks, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
    groups = [{"params": blocks, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]


def save(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, trained: dict) -> None:
    """Write config, bf16 weights, tokenizer and what went into them; the model itself keeps its dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = Gemma2ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only, but shipped in a package
    tokenizer.save_pretrained(folder)
    (folder / TRAINED).write_text(json.dumps(trained) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="training tokens; the schedule follows them")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="longest training time; the schedule shrinks to it"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the run")
    parser.add_argument("--optimiser", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 (faster where the CPU has it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="weights to go on from, written by an earlier run")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0, help="time between two saves of the weights")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    by_split: dict[str, list[str]] = {"train": [], "attribution": [], "evaluation": []}
    for document in load_documents("embedded"):
        by_split[split_of(document.text, ATTRIBUTION, EVALUATION)].append(document.text)
    if args.start_from:  # the weights belong to its ids
        tokenizer = wrapped(Tokenizer.from_file(str(args.start_from / "tokenizer.json")))
    else:
        tokenizer = train_tokenizer(by_split["train"])
    train = encode(tokenizer, by_split["train"])
    evaluation_NT = sequences(held := encode(tokenizer, by_split["evaluation"]), [0] * len(held))
    watch_NT = evaluation_NT[:: max(1, len(evaluation_NT) // 200)]  # a glance during training
    train_tokens = sum(map(len, train))
    print({name: len(texts) for name, texts in by_split.items()}, f"{train_tokens:,} training tokens", flush=True)

    model = Gemma2ForCausalLM(Gemma2Config(**ARCHITECTURE, attn_implementation="eager"))
    before = {"tokens": 0, "steps": 0, "minutes": 0.0, "runs": 0}
    if args.start_from:
        before = json.loads((args.start_from / TRAINED).read_text())
        earlier = AutoModelForCausalLM.from_pretrained(args.start_from, dtype=torch.float32, trust_remote_code=False)
        model.load_state_dict(earlier.state_dict())

    def trained() -> dict:
        minutes = (time.monotonic() - started) / 60
        return {
            "tokens": before["tokens"] + seen,
            "steps": before["steps"] + step,
            "minutes": before["minutes"] + minutes,
            "runs": before["runs"] + 1,
        }

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)
    opts = optimisers(model, args.lr, args.optimiser == "muon")
    started = checkpoint = time.monotonic()
    seen, step, smooth = 0, 0, None
    epoch = round(before["tokens"] / train_tokens)
    progress = 0.0
    while progress < 1:
        # Each pass cuts the documents at other places, so that a token is not always seen with the same context.
        rng = np.random.default_rng([args.seed, epoch])
        offsets = rng.integers(0, CONTEXT - 1, len(train)).tolist() if epoch else [0] * len(train)
        rows_NT = rng.permutation(sequences(train, offsets))
        for first in range(0, len(rows_NT) - args.batch + 1, args.batch):
            progress = max(seen / args.tokens, (time.monotonic() - started) / 60 / args.minutes)
            if progress >= 1:
                break
            lr = args.lr * min(1.0, progress / args.warmup, 0.5 * (1 + math.cos(math.pi * progress)))
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr
            ids_BT = torch.from_numpy(rows_NT[first : first + args.batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = training_loss(model, ids_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            step += 1
            seen += int((ids_BT != PAD).sum())
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if step % 50 == 0:
                rate = seen / (time.monotonic() - started)
                print(f"step {step} tokens {seen:,} loss {smooth:.3f} lr {lr:.2e} tok/s {rate:,.0f}", flush=True)
            if time.monotonic() - checkpoint > 60 * args.checkpoint_minutes:
                checkpoint = time.monotonic()
                save(model, tokenizer, args.out / "checkpoint", trained())
                print(f"step {step} held-out glance {held_out_loss(model, watch_NT)[0]:.3f}", flush=True)
        epoch += 1
    done = trained()

    save(model, tokenizer, args.out, done)
    shutil.rmtree(args.out / "checkpoint", ignore_errors=True)
    saved = AutoModelForCausalLM.from_pretrained(
        args.out, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    loss, targets = held_out_loss(saved, evaluation_NT)
    (args.out / "README.md").write_text(
        CARD.format(
            **ARCHITECTURE,
            parameters=parameters,
            size=(args.out / "model.safetensors").stat().st_size,
            train_documents=len(train),
            train_tokens=train_tokens,
            held_documents=len(by_split["attribution"]) + len(by_split["evaluation"]),
            attribution=ATTRIBUTION,
            evaluation=EVALUATION,
            tokens=done["tokens"],
            epochs=done["tokens"] / train_tokens,
            context=CONTEXT,
            steps=done["steps"],
            batch=args.batch,
            optimiser="Muon and AdamW" if args.optimiser == "muon" else "AdamW",
            seed=args.seed,
            minutes=done["minutes"],
            runs=done["runs"],
            plural="s" * (done["runs"] > 1),
            threads=torch.get_num_threads(),
            loss=loss,
            loss_tokens=targets,
            evaluation_documents=len(by_split["evaluation"]),
        )
    )
    print(
        f"held-out loss {loss:.4f} nats over {targets:,} targets; {done['minutes']:.1f} minutes; {args.out}", flush=True
    )


if __name__ == "__main__":
    main()

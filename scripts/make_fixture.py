#!/usr/bin/env python3
"""Makes tests/fixtures/bert_tiny_*: what PyTorch and transformers say about a tiny BERT.

Ten AdamW steps, without dropout, in fp32 and under CPU bf16 autocast, from the same weights over the same batches. The
trainer has to meet these losses. Run with torch 2.11.0, transformers and safetensors:

    python scripts/make_fixture.py
"""

import json
import pathlib

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
STEPS, SAMPLES, LENGTH, VOCAB = 10, 8, 32, 512
PAD, CLS, SEP, MASK, FIRST = 0, 2, 3, 4, 5

MODEL = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LENGTH,
    type_vocab_size=2,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.08,
    layer_norm_eps=1e-12,
    pad_token_id=PAD,
)
OPTIMIZER = dict(lr=2e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.05, max_grad_norm=1.0)


def batches(generator):
    """Sequences in which the next token mostly follows from the last: something can be learnt in ten steps."""
    count = STEPS * SAMPLES
    ids = torch.empty(count, LENGTH, dtype=torch.long)
    ids[:, 0] = torch.randint(FIRST, VOCAB, (count,), generator=generator)
    for at in range(1, LENGTH):
        follow = (ids[:, at - 1] * 7 + 11) % 64 + FIRST
        other = torch.randint(FIRST, VOCAB, (count,), generator=generator)
        keep = torch.rand(count, generator=generator) < 0.85
        ids[:, at] = torch.where(keep, follow, other)
    ids[:, 0], ids[:, -1] = CLS, SEP
    # Every third sample is shorter than the rest; the numbers of masked tokens differ between samples.
    attention = torch.ones_like(ids)
    for sample in range(0, count, 3):
        length = int(torch.randint(LENGTH // 2, LENGTH, (1,), generator=generator))
        ids[sample, length - 1] = SEP
        ids[sample, length:] = PAD
        attention[sample, length:] = 0
    chosen = torch.rand(count, LENGTH, generator=generator) < 0.2
    chosen &= ids >= FIRST
    labels = torch.where(chosen, ids, -100)
    ids = torch.where(chosen & (torch.rand(count, LENGTH, generator=generator) < 0.8), MASK, ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": attention}


def train(model, data, precision):
    """Losses and gradient norms of the ten steps."""
    decay = [p for n, p in model.named_parameters() if not (n.endswith(".bias") or "LayerNorm" in n)]
    plain = [p for n, p in model.named_parameters() if n.endswith(".bias") or "LayerNorm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = {name: rows[step * SAMPLES : (step + 1) * SAMPLES] for name, rows in data.items()}
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**batch).logits
        loss = F.cross_entropy(logits.float().view(-1, VOCAB), labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return {"losses": losses, "grad_norms": norms}


def main():
    torch.manual_seed(1)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(2)
    data = batches(generator)
    model = BertForMaskedLM(BertConfig(**MODEL)).train()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    # As transformers saves it: the tied decoder is left out.
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    weights = {name: value.contiguous() for name, value in first.items() if name not in tied}
    save_file(weights, FOLDER / "bert_tiny_weights.safetensors", metadata={"format": "pt"})
    save_file(data, FOLDER / "bert_tiny_batches.safetensors")
    results = {}
    for precision in ("fp32", "bf16"):
        model.load_state_dict(first)
        results[precision] = train(model, data, precision)
    document = {
        "made_by": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples_per_step": SAMPLES,
        "model": MODEL,
        "optimizer": OPTIMIZER,
        **results,
    }
    (FOLDER / "bert_tiny_losses.json").write_text(json.dumps(document, indent=2) + "\n")
    for precision, result in results.items():
        print(precision, " ".join(f"{loss:.5f}" for loss in result["losses"]))


if __name__ == "__main__":
    main()

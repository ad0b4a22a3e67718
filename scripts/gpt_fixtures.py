#!/usr/bin/env python3
"""Makes tests/fixtures/gpt_*: what PyTorch and transformers say about a tiny GPT-2, a tiny Llama and a tiny Mixtral.

Ten AdamW steps in fp32, without dropout, from the same weights over the same batches, then greedy tokens of `generate`. The trainer has to
meet the losses, the last weights and the tokens. Llama comes twice: with a head of its own, and with the embedding as its head. Mixtral is trained with
the balance of its experts beside the loss: transformers' own function, of one layer at a time, and the mean of the layers.

First weights are rounded to f16 and kept in that type: they are as short as that, and exactly what both sides begin with. Adam's eps is 1e-5:
the bias of the keys has no gradient but rounding (softmax does not see what all keys have in common), and a smaller eps would make steps of
it. What that leaves is checked before anything is written: greedy tokens are ahead of the next best by `MARGIN`.

Run with torch 2.11.0, transformers and safetensors:

    python scripts/gpt_fixtures.py [--compare] [--only CASE]

`--only` makes one case again, and leaves what there is of the others.

`--compare` writes nothing and prints how far the numbers are from those of the files: under another processor's code
(`ATEN_CPU_CAPABILITY=default`, `MKL_CBWR=COMPATIBLE`) that is what rounding alone makes of them.
"""

import argparse
import json
import pathlib
import tempfile

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
# A vocabulary that neither two nor three nor four ranks divide.
STEPS, SAMPLES, LENGTH, VOCAB = 10, 4, 24, 101
POSITIONS, NEW_TOKENS = 32, 20
PROMPTS = ([3, 31, 24, 75], [50])
# A hundred times what rounding does to a logit.
MARGIN = 1e-3
# An expert that a token takes is as much more probable than the best that it does not take: ten times what rounding makes of ten steps.
ROUTING_MARGIN = 5e-5

GPT2 = dict(
    model_type="gpt2",
    vocab_size=VOCAB,
    n_positions=POSITIONS,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_inner=64,
    activation_function="gelu_new",
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    layer_norm_epsilon=1e-5,
    initializer_range=0.1,
)
LLAMA = dict(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=POSITIONS,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
MIXTRAL = dict(
    LLAMA,
    model_type="mixtral",
    rope_theta=10000.0,
    num_local_experts=4,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.02,
)
CASES = {"gpt2": GPT2, "llama": LLAMA, "llama_tied": {**LLAMA, "tie_word_embeddings": True}, "mixtral": MIXTRAL}
# By case, where 1 does not keep the margins.
SEEDS = {"mixtral": 3}
OPTIMIZER = dict(lr=5e-3, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1, max_grad_norm=1.0)


def batches(generator):
    """Sequences in which the next token mostly follows from the last: something can be learnt in ten steps."""
    count = STEPS * SAMPLES
    ids = torch.empty(count, LENGTH + 1, dtype=torch.long)
    ids[:, 0] = torch.randint(VOCAB, (count,), generator=generator)
    for at in range(1, LENGTH + 1):
        follow = (ids[:, at - 1] * 7 + 11) % VOCAB
        other = torch.randint(VOCAB, (count,), generator=generator)
        keep = torch.rand(count, generator=generator) < 0.85
        ids[:, at] = torch.where(keep, follow, other)
    # Label j is what follows input j; here and there nothing is to be predicted.
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def build(model):
    """The network, weights rounded to f16. Biases and norms do not begin as zeros and ones."""
    model = dict(model)
    kind = model.pop("model_type")
    plain = dict(attn_implementation="eager", bos_token_id=0, eos_token_id=None, pad_token_id=None)
    if kind == "gpt2":
        network = GPT2LMHeadModel(GPT2Config(**model, **plain))
    elif kind == "mixtral":
        # One expert after the other: sums are in an order of their own.
        network = MixtralForCausalLM(MixtralConfig(**model, **plain, experts_implementation="eager"))
    else:
        network = LlamaForCausalLM(LlamaConfig(**model, **plain))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    return network.train()


EXTRA = {"mixtral": dict(output_router_logits=True)}


def balance(config, output):
    """Of experts, times its coefficient."""
    if config.model_type != "mixtral":
        return 0.0
    for logits in output.router_logits:
        best = logits.softmax(-1).topk(config.num_experts_per_tok + 1).values
        margin = (best[:, -2] - best[:, -1]).min().item()
        assert margin > ROUTING_MARGIN, f"two experts are {margin} apart: take another seed"
    layers = [
        load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return config.router_aux_loss_coef * sum(layers) / len(layers)


def train(network, data):
    """Losses and gradient norms of the ten steps."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
    )
    losses, norms = [], []
    for step in range(STEPS):
        rows = slice(step * SAMPLES, (step + 1) * SAMPLES)
        output = network(input_ids=data["input_ids"][rows], **EXTRA.get(network.config.model_type, {}))
        loss = F.cross_entropy(output.logits.view(-1, VOCAB), data["labels"][rows].reshape(-1))
        optimizer.zero_grad()
        # What is compared is the loss of the tokens; what is trained has the balance as well.
        (loss + balance(network.config, output)).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return {"losses": losses, "grad_norms": norms}


@torch.no_grad()
def generate(network, prompt):
    """Greedy tokens behind the prompt, each ahead of the next best."""
    network.eval()
    ids = torch.tensor([prompt])
    tokens = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    best = network(input_ids=tokens).logits[0, len(prompt) - 1 : -1].topk(2).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    assert margin > MARGIN, f"two tokens are {margin} apart: take another seed"
    return tokens[0, len(prompt) :].tolist()


def weights(network, kind):
    """As transformers saves them: a tied head is left out, and so are masks."""
    tied = network.config.tie_word_embeddings
    if network.config.model_type == "mixtral":
        # In memory experts are one tensor, in files each has its own.
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            return {n: v.to(kind) for n, v in load_file(f"{folder}/model.safetensors").items()}
    state = network.state_dict()
    return {n: v.clone().to(kind).contiguous() for n, v in state.items() if not (tied and n == "lm_head.weight")}


def in_memory(network, tensors):
    """The tensors of a file as the network has them."""
    if network.config.model_type != "mixtral":
        return tensors
    tensors = {n.replace("block_sparse_moe", "mlp"): v for n, v in tensors.items()}
    count = network.config.num_local_experts
    for layer in range(network.config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = ([tensors.pop(f"{at}.{e}.{w}.weight") for e in range(count)] for w in ("w1", "w2", "w3"))
        tensors[f"{at}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3)])
        tensors[f"{at}.down_proj"] = torch.stack(w2)
    assert set(tensors) <= set(network.state_dict())
    return tensors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", choices=CASES)
    arguments = parser.parse_args()
    compare, only = arguments.compare, arguments.only
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = batches(torch.Generator().manual_seed(2))
    document = {
        "made_by": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples_per_step": SAMPLES,
        "optimizer": OPTIMIZER,
        "cases": {},
    }
    files = {} if only else {"gpt_batches": data}
    if only and not compare:
        document["cases"] = json.loads((FOLDER / "gpt_losses.json").read_text())["cases"]
    for case, model in CASES.items():
        if only not in (None, case):
            continue
        torch.manual_seed(SEEDS.get(case, 1))
        network = build(model)
        # The tied Llama begins as the other one, and its last weights would show nothing new: there are no files of it.
        first = f"gpt_{case.removesuffix('_tied')}_first"
        if compare:
            files[first] = load_file(FOLDER / f"{first}.safetensors")
        elif first not in files:
            files[first] = weights(network, torch.float16)
        # Its head is the embedding, and not what the file has beside that.
        tied = network.config.tie_word_embeddings
        kept = {n: v for n, v in files[first].items() if not (tied and n == "lm_head.weight")}
        network.load_state_dict(in_memory(network, kept), strict=False)
        result = train(network, data)
        if case != "llama_tied":
            files[f"gpt_{case}_last"] = weights(network, torch.float32)
        tokens = [{"prompt": prompt, "tokens": generate(network, prompt)} for prompt in PROMPTS]
        document["cases"][case] = {"model": model, **result, "greedy": tokens}
        print(case, " ".join(f"{loss:.5f}" for loss in result["losses"]))
    if compare:
        return differences(document, files)
    for name, tensors in files.items():
        save_file(tensors, FOLDER / f"{name}.safetensors", metadata={"format": "pt"})
    (FOLDER / "gpt_losses.json").write_text(json.dumps(document, indent=1) + "\n")


def differences(document, files):
    """The largest differences from what the files hold."""
    known = json.loads((FOLDER / "gpt_losses.json").read_text())
    for case, result in document["cases"].items():
        old = known["cases"][case]
        losses = max(abs(a - b) for a, b in zip(result["losses"], old["losses"]))
        print(f"{case}: losses {losses:.1e}, tokens {'equal' if result['greedy'] == old['greedy'] else 'DIFFER'}")
    for name, tensors in files.items():
        old = load_file(FOLDER / f"{name}.safetensors")
        print(f"{name}: {max((v - old[n]).abs().max().item() for n, v in tensors.items()):.1e}")


if __name__ == "__main__":
    main()

"""Sections ③ to ⑦ of common.py: plan, pack, log-probs, sample. Every expectation is computed here, by the plain model.

The models are tiny and random, with weights scaled up so that their log-probs really vary. B1, G5, … are the numbers of
the traps (symptoms seen in other implementations) that a test keeps out.
"""
import contextlib
import functools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from common import (  # noqa: E402
    Group, Plan, attention_mask, can_pack, completion_logps, draw, for_all, micro_batches, pack, pad, sample, sum_by,
    token_logps)

V = 131
LLAMA = dict(
    vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW = dict(LLAMA, head_dim=16, sliding_window=16)
GPT2 = dict(vocab_size=V, n_embd=64, n_layer=3, n_head=4)
NEOX = dict(vocab_size=V, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {                                                   # name: (model type, config); a dash names a variation
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", dict(LLAMA, tie_word_embeddings=True)),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", dict(LLAMA, head_dim=16)),
    "mistral": ("mistral", WINDOW),
    "gemma2": ("gemma2", WINDOW),
    "gemma2-cap": ("gemma2", dict(WINDOW, final_logit_softcapping=2.0)),
    "phi3": ("phi3", LLAMA),
    "gemma3": ("gemma3_text", dict(WINDOW, layer_types=ALTERNATING)),
    "gpt2": ("gpt2", GPT2),
    "gptj-head-bias": ("gptj", dict(GPT2, rotary_dim=8)),
    "gpt_neox": ("gpt_neox", dict(NEOX, intermediate_size=96)),
    "opt": ("opt", dict(NEOX, ffn_dim=96, word_embed_proj_dim=64)),
    "cohere": ("cohere", dict(LLAMA, logit_scale=0.4)),
    "granite": ("granite", dict(LLAMA, logits_scaling=0.4)),
}
GPT_NEO = dict(
    vocab_size=V, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16)
OTHERS = {                                                   # not to be packed, but correct when padded
    "bloom": ("bloom", dict(vocab_size=V, hidden_size=64, n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2)),
    "falcon_h1": ("falcon_h1", dict(LLAMA, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)),
    "gpt_neo": ("gpt_neo", GPT_NEO),
    "lfm2": ("lfm2", dict(LLAMA, layer_types=["conv", "full_attention", "conv"])),
}
SPEC = [(5, (3, 7)), (30, (20, 4)), (1, (1, 2)), (12, (40, 41, 3)), (9, (1,))]       # prompt length, completion lengths


@functools.cache
def build(name):
    torch.manual_seed(sum(map(ord, name)))
    model_type, config = (MODELS | OTHERS)[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():                # biases and norms too, which are 0 and 1 in a new model
            if p.dim() > 1 and "conv" not in n:
                p.mul_(6)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def group(prompt_ids, completion_ids):
    return Group("", "", [], prompt_ids=prompt_ids, completion_ids=completion_ids)


def make(spec, seed=0, vocab=V):
    r = random.Random(seed)

    def ids(n):
        return [r.randrange(3, vocab) for _ in range(n)]

    return [group(ids(prompt), [ids(n) for n in completions]) for prompt, completions in spec]


def alone(model, prompt, ids, temperature=1.0):
    """Log-probs of one completion by the plain forward of one row, softmax in float64: (T,)."""
    logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1:-1].double()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def expected(model, groups, temperature=1.0):
    with torch.no_grad():
        return torch.cat([alone(model, g.prompt_ids, ids, temperature) for g in groups for ids in g.completion_ids])


def gradient(model, scalar):
    model.zero_grad(set_to_none=True)
    scalar.backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])


def close(a, b, tolerance=1e-5):
    """Relative to the largest entry: what float32 can promise for sums in another order."""
    return (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1)


# ③ plan ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch, epochs, max_steps, sizes", [
    (10, 8, 3, 0, [8, 2] * 3),                               # B16: 2 × accumulation 4, 10 rows, 3 epochs: 6 updates
    (7, 7, 2, 0, [7, 7]),
    (3, 8, 1, 0, [3]),
    (10, 4, 1, 7, [4, 4, 2, 4, 4, 2, 4]),
    (10, 4, 5, 2, [4, 4]),
])
def test_B16_every_row_once_an_epoch_and_the_ragged_step_kept(n, batch, epochs, max_steps, sizes):
    steps = Plan(n, batch, epochs, max_steps, seed=3)
    assert [len(s) for s in steps] == sizes and len(steps) == len(sizes)
    flat = [i for s in steps for i in s]
    for start in range(0, len(flat), n):
        epoch = flat[start:start + n]
        assert len(set(epoch)) == len(epoch) and (len(epoch) < n or set(epoch) == set(range(n)))


def test_D10_plan_is_a_pure_function_of_the_seed():
    a = list(Plan(50, 8, 2, 0, seed=1))
    random.seed(99)
    state = random.getstate()
    assert a == list(Plan(50, 8, 2, 0, seed=1)) != list(Plan(50, 8, 2, 0, seed=2)) and random.getstate() == state
    assert a[:7] == list(Plan(50, 8, 1, 0, seed=1)) and a[7:] != a[:7]        # the second epoch: another permutation
    backwards = Plan(50, 8, 2, 0, seed=1)
    assert [backwards[step] for step in reversed(range(14))] == a[::-1]       # a resumed run begins anywhere
    for outside in (-1, 14):
        with pytest.raises(IndexError):
            backwards[outside]
    with pytest.raises(SystemExit):
        Plan(0, 8, 1, 0, seed=1)


@pytest.mark.parametrize("budget", [1, 20, 64, 100, 10 ** 6])
def test_micro_batches_keep_the_budget_and_every_group(budget):
    groups = make(SPEC + [(3, (k,)) for k in range(1, 20)])

    def size(g):
        return len(g.prompt_ids) + sum(len(c) for c in g.completion_ids)

    batches = micro_batches(groups, budget)
    assert sorted(id(g) for b in batches for g in b) == sorted(map(id, groups))
    assert all(sum(map(size, b)) <= budget or len(b) == 1 for b in batches)
    assert len(batches) == {1: len(groups), 10 ** 6: 1}.get(budget, len(batches))
    padded = micro_batches(groups, budget, packed=False)     # here every prompt is repeated, and padding counts
    assert sorted(id(g) for b in padded for g in b) == sorted(map(id, groups))
    assert all(pad(b).input_ids.numel() <= budget or len(b) == 1 for b in padded)


# ④ pack ---------------------------------------------------------------------------------------------------------------

def numbered(spec):
    """Groups in which every token has its own id, and what it stands for: (group, completion or None, position)."""
    groups = []
    what = {}

    def new(n, g, completion, start):
        ids = range(len(what) + 1, len(what) + 1 + n)
        what.update({i: (g, completion, start + j) for j, i in enumerate(ids)})
        return list(ids)

    for g, (p, completions) in enumerate(spec):
        prompt = new(p, g, None, 0)
        groups.append(group(prompt, [new(n, g, k, p) for k, n in enumerate(completions)]))
    return groups, what


@pytest.mark.parametrize("seed", range(3))
def test_pack_holds_each_prompt_and_completion_once_with_little_padding(seed):
    r = random.Random(seed)
    spec = []
    for _ in range(40):
        prompt = r.randint(1, 80)
        spec.append((prompt, [r.randint(1, 60) for _ in range(r.randint(1, 4))]))
    groups, what = numbered(spec)
    batch = pack(groups, row=1024, even=10 ** 9)
    ids = batch.input_ids
    flat = ids.flatten().tolist()
    assert sorted(i for i in flat if i) == sorted(what)                       # nothing lost, nothing twice
    assert flat.count(0) < 0.05 * len(flat) and batch.lengths.tolist() == (ids != 0).sum(1).tolist()
    assert all(what[i][2] == p for i, p in zip(flat, batch.positions.flatten().tolist()) if i)

    owner = batch.owner.tolist()
    target = batch.target.tolist()
    completions = [c for g in groups for c in g.completion_ids]
    for k, completion in enumerate(completions):
        assert [t for t, o in zip(target, owner) if o == k] == completion
    assert batch.count == len(completions)
    assert [flat[i] for i in batch.last] == [c[-1] for c in completions]
    before = {}
    for g in groups:
        for c in g.completion_ids:
            before |= dict(zip(c, g.prompt_ids[-1:] + c))
    assert [flat[i] for i in batch.read] == [before[t] for t in target]
    assert sum_by(torch.ones(len(owner)), batch.owner, batch.count).tolist() == [len(c) for c in completions]


def test_pack_splits_a_large_group_and_repeats_only_its_prompt():
    groups, what = numbered([(4, (6, 5, 7, 12)), (3, (2,))])
    flat = pack(groups, row=16, tree=16, even=10 ** 9).input_ids.flatten().tolist()      # 6 + 5, 7, 12: three trees
    assert [flat.count(i) for i in groups[0].prompt_ids] == [3] * 4
    assert all(flat.count(i) == 1 for i in what if i not in groups[0].prompt_ids)
    with pytest.raises(AssertionError, match="empty"):
        pack([group([1], [[]])])


@pytest.mark.parametrize(
    "prompt, completion, even", [(800, 50, 384), (15, 128, 384), (15, 128, 24576), (300, 40, 3072)])
def test_pack_shares_a_prompt_as_far_as_that_is_cheapest(prompt, completion, even):
    """Against the cost itself, tokens × (1 + row length / even), for every number of completions a tree."""
    cost = {m: (prompt / m + completion) * (1 + (prompt + m * completion) / even) for m in range(1, 33)}
    one = group([1] * prompt, [[2] * completion] * 32)
    flat = pack([one], row=1, tree=10 ** 9, even=even).input_ids.flatten().tolist()
    used = 32 / (flat.count(1) / prompt)                     # completions a tree, on average
    assert min(cost.values()) <= cost[round(used)] <= 1.1 * min(cost.values())


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("window, layers, types", [
    (None, None, [FULL]), (None, [FULL] * 2, [FULL]), (4, None, [SLIDING]), (4, [SLIDING] * 2, [SLIDING]),
    (4, [FULL] * 2, [FULL]), (4, [SLIDING, FULL], [SLIDING, FULL])])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_mask_equals_brute_force(attention, window, layers, types):
    groups, what = numbered([(3, (4, 6)), (1, (2, 1, 3)), (5, (1,))])
    batch = pack(groups, row=14)
    config = SimpleNamespace(_attn_implementation=attention, sliding_window=window, layer_types=layers)
    masks = attention_mask(batch, config)
    masks = masks if len(types) > 1 else {types[0]: masks}   # one mask for all layers, or one for each type of layer
    rows, n = batch.input_ids.shape
    assert set(masks) == set(types) and rows > 1
    for name, mask in masks.items():
        assert mask.shape == (rows, 1, n, n) and mask.dtype == (torch.bool if attention == "sdpa" else torch.float32)
        if attention == "eager":                             # added to the scores
            assert ((mask == 0) | (mask < -1e30)).all()
            mask = mask == 0
        for r, row in enumerate(batch.input_ids.tolist()):
            for q, a in enumerate(row):
                sees = mask[r, 0, q].tolist()
                if a == 0:                                   # padding sees some padding, so no softmax over nothing
                    assert any(sees) and not any(s and b for s, b in zip(sees, row))
                    continue
                g, c, p = what[a]
                for b, s in zip(row, sees):
                    h, d, o = what.get(b, (None, None, 0))
                    assert s == (g == h and d in (None, c) and o <= p and (name == FULL or p - o < window))


# ⑤ log-probs ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_padded_equals_each_completion_alone(name):
    model = build(name)
    groups = make(SPEC)
    batch = pack(groups, row=64, tree=60)
    assert batch.input_ids.shape[0] > 1 and batch.tree.max() > 0
    assert (batch.branch == -1).sum() > sum(p for p, _ in SPEC)
    want = expected(model, groups)
    assert want.std() > 0.3
    with torch.no_grad():
        for layout in (batch, pack(groups), pad(groups)):
            got = token_logps(model, layout)
            assert got.dtype == torch.float32 and (got - want).abs().max() < 2e-5
        assert (token_logps(model, batch, 0.7) - expected(model, groups, 0.7)).abs().max() < 3e-5
    assert can_pack(model, groups)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_be_packed_are_found_out_and_correct_when_padded(name, capsys):
    model = build(name)
    groups = make(SPEC)
    assert not can_pack(model, groups) and "falling back to padding" in capsys.readouterr().out
    want = expected(model, groups)
    assert want.std() > 0.3
    with torch.no_grad():
        assert (token_logps(model, pad(groups)) - want).abs().max() < 1e-4


def test_can_pack_sees_a_state_that_runs_on_into_the_next_tree(monkeypatch):
    monkeypatch.setattr(common, "ROW", 8)                    # every completion is longer: each would have its own row
    assert not can_pack(build("falcon_h1"), make([(9, (4,)), (10, (5,)), (11, (6,))]))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "gemma2-cap", "gptj-head-bias", "gpt2", "cohere"])
def test_B15_gradient_depends_neither_on_layout_nor_on_chunks_nor_on_the_budget(name, monkeypatch):
    model = build(name)
    groups = make(SPEC + [(4, (6, 2)), (2, (5, 9)), (7, (3, 3))])
    weight = {}
    for g in groups:
        factors = torch.randn(3, generator=torch.Generator().manual_seed(7)).tolist()
        weight |= {id(c): w for c, w in zip(g.completion_ids, factors)}

    def loss(part, layout=pack):                             # a weighted sum, so that nothing cancels or hides
        batch = layout(part)
        w = torch.tensor([weight[id(c)] for g in part for c in g.completion_ids])
        return (w * sum_by(token_logps(model, batch), batch.owner, batch.count)).sum()

    def narrow(part):
        return pack(part, row=64, tree=60)

    one_by_one = [weight[id(c)] * alone(model, g.prompt_ids, c).sum() for g in groups for c in g.completion_ids]
    want = gradient(model, sum(one_by_one))
    assert want.abs().max() > 0.1
    assert close(gradient(model, loss(groups)), want)
    assert close(gradient(model, loss(groups, pad)), want)
    assert close(gradient(model, loss(groups, narrow)), want)
    counts = set()
    for budget in (1, 120, 170, 10 ** 6):                    # micro-batches of one group, … all groups
        parts = micro_batches(groups, budget)
        counts.add(len(parts))
        assert close(gradient(model, sum(loss(p) for p in parts)), want)
    assert {1, len(groups)} < counts
    for rows in (1, 7, 50):
        monkeypatch.setattr(common, "CHUNK", rows * V)
        assert close(gradient(model, loss(groups)), want)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 10 ** 6])
def test_for_all_gives_a_column_in_the_order_of_the_groups(budget, packed):
    """A value a completion or a value a token, also where some micro-batches hold completions of one token only."""
    model = build("llama")
    groups = make(SPEC + [(2, (1, 1)), (3, (1,)), (6, (1, 1, 1))])
    want = expected(model, groups)
    options = (model, groups, budget, packed, contextlib.nullcontext(), None)
    assert (for_all(token_logps, *options) - want).abs().max() < 2e-5
    sums = torch.stack([part.sum() for part in want.split([len(ids) for g in groups for ids in g.completion_ids])])
    assert (for_all(completion_logps, *options) - sums).abs().max() < 1e-4


class Table(torch.nn.Module):
    """A fake causal LM: the log-prob of token i, read at position t, is −(100 (t + 1) + i); the last has the rest."""
    base_model_prefix = "body"

    def __init__(self, positions=8, vocab=50):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.body = torch.nn.Module()
        self.body.config = self.config
        self.body.forward = self.hidden
        self.head = torch.nn.Linear(positions, vocab, bias=False)
        table = -(100.0 * (torch.arange(positions)[:, None] + 1) + torch.arange(vocab))
        table[:, -1] = 0
        self.head.weight.data = table.T.contiguous()

    def hidden(self, input_ids, attention_mask, position_ids, use_cache):
        return SimpleNamespace(last_hidden_state=F.one_hot(position_ids, self.head.in_features).float())

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(logits=self.head(self.hidden(None, None, positions, False).last_hidden_state))


@pytest.mark.parametrize("layout", [pack, pad])
def test_B1_first_token_is_predicted_by_the_last_prompt_token(layout):
    batch = layout([group([4, 5, 6], [[7, 9, 2], [8, 2]]), group([1], [[3, 2]])])
    got = token_logps(Table(), batch)
    assert got.tolist() == [-307, -409, -502, -308, -402, -103, -202]
    assert sum_by(got, batch.owner, batch.count).tolist() == [-1218, -710, -305]


def spoil(model, layout, value, where):
    """token_logps and its gradient, with `value` in hidden states (packed) or logits (padded) at `where`."""
    def hook(module, inputs, output):
        key = "last_hidden_state" if layout.tree is not None else "logits"
        output[key] = torch.where(where[..., None], value, output[key])
        return output

    spoilt = getattr(model, model.base_model_prefix) if layout.tree is not None else model
    handle = spoilt.register_forward_hook(hook)
    try:
        got = token_logps(model, layout)
        return got.detach(), gradient(model, got.sum())
    finally:
        handle.remove()


@pytest.mark.parametrize("layout", [pack, pad])
def test_B2_B18_prompt_and_padding_never_reach_the_result(layout):
    model = build("llama")
    groups, what = numbered([(5, (3, 7)), (2, (9, 4)), (20, (6,)), (1, (2,)), (6, (5,))])
    batch = layout(groups, row=30) if layout is pack else layout(groups)
    ends = {g.prompt_ids[-1] for g in groups}
    inside = {i for i, (_, completion, _) in what.items() if completion is None and i not in ends}
    prompt = torch.isin(batch.input_ids, torch.tensor(sorted(inside)))
    padding = batch.input_ids == 0
    assert prompt.any() and padding.any()
    nowhere = torch.zeros_like(padding)
    clean, clean_gradient = spoil(model, batch, 0.0, nowhere)
    for value, where in ((1e4, prompt), (math.nan, padding), (math.nan, prompt | padding)):
        got, _ = spoil(model, batch, value, where)
        assert torch.equal(got, clean)
    assert torch.isfinite(clean_gradient).all()
    head = model.get_output_embeddings().weight
    spoil(model, batch, math.nan, prompt | padding)
    assert torch.isfinite(head.grad).all() and head.grad.abs().max() > 0


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_B3_softmax_of_bfloat16_logits_is_float32(mode):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **dict(LLAMA, vocab_size=4096, max_position_embeddings=1024))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data.mul_(20)
    model = model.bfloat16() if mode == "weights" else model
    groups = make([(3, (990,)), (2, (10, 5))], vocab=4096)
    logits = []
    handle = model.lm_head.register_forward_hook(lambda m, i, output: logits.append(output.flatten(0, -2)))
    for batch in (pack(groups), pad(groups)):
        logits.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = token_logps(model, batch)
        own = torch.cat(logits) if batch.tree is not None else torch.cat(logits)[batch.read]
        assert own.dtype == torch.bfloat16 and got.dtype == torch.float32
        want = own.double().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        assert want.std() > 0.3 and (got - want).abs().max() < 1e-3
        assert abs(sum_by(got, batch.owner, batch.count)[0] - want[:990].sum()) < 1e-2
    handle.remove()


def test_B4_chunks_are_not_kept_for_the_backward(monkeypatch):
    """All chunks but the last: with 32 chunks about 3 % of the bytes of one."""
    model = build("llama")
    vocab = 2048
    batch = pack(make([(4, (512,))]))
    head = torch.nn.Linear(64, vocab, bias=False)
    leaf = torch.randn(batch.input_ids.numel(), 64, requires_grad=True)
    monkeypatch.setattr(common, "hidden_states", lambda model, batch: leaf)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: head)
    results = []
    for chunk in (512 * vocab, 16 * vocab):
        monkeypatch.setattr(common, "CHUNK", chunk)
        kept = {}

        def keep(t):
            if t.data_ptr() != head.weight.data_ptr():
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()  # noqa: B023
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logps = token_logps(model, batch)
        leaf.grad = None
        gradient(head, (logps * torch.linspace(-1, 1, 512)).sum())
        results.append((sum(kept.values()), logps.detach(), leaf.grad.clone(), head.weight.grad.clone()))
    (full, *want), (chunked, *got) = results
    assert full > 512 * vocab * 4 * 0.9 and chunked < 0.1 * full
    assert all(close(a, b, 1e-6) for a, b in zip(got, want))


# ⑦ sample -------------------------------------------------------------------------------------------------------------

PROMPTS = [g.prompt_ids for g in make([(9, ()), (1, ()), (30, ()), (4, ())], seed=5)]
CACHED = ["llama", "qwen2", "qwen3", "gpt2", "opt", "mistral", "gemma2", "gemma3", "bloom", "falcon_h1", "lfm2"]


def greedy_reference(model, prompt, stops, limit):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt):]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")       # renamed in transformers 5.23, unknown to 5.17
@pytest.mark.parametrize("name", CACHED)
def test_A22_A23_G1_greedy_batch_is_step_by_step_argmax_without_cache(name):
    """Unequal prompts, padded on the left, past the sliding window, rows that leave early; in train mode with gradient
    checkpointing."""
    model = build(name)
    stops = list(range(3, 11))
    limit = 24
    want = [greedy_reference(model, p, stops, limit) for p in PROMPTS]
    try:
        model.train()
        model.gradient_checkpointing_enable()
        got = sample(model, PROMPTS, 2, limit, stops, greedy=True)
        assert model.training
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert [s.ids for s in got] == [w for w in want for _ in range(2)]        # prompt 0 twice, prompt 1 twice, …
    assert [s.ended for s in got[::2]] == [w[-1] in stops for w in want]
    for prompt, s in zip(PROMPTS, got[1::2]):
        assert (torch.tensor(s.logps) - expected(model, [group(prompt, [s.ids])])).abs().max() < 5e-5
    sample(model, PROMPTS, 1, 1, stops)
    assert not model.training


def test_sampling_without_a_cache_is_refused_in_a_sentence(capsys):
    with pytest.raises(SystemExit):
        sample(build("mamba"), PROMPTS, 1, 2, [2])
    assert "past_key_values" in capsys.readouterr().err and not build("mamba").training


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_G3_G5_G8_sampled_logps_are_those_of_the_training_forward(name, temperature):
    model = build(name)
    got = sample(model, PROMPTS, 3, 20, list(range(3, 9)), temperature, seed=1)
    groups = [group(p, [s.ids for s in got[3 * i:3 * i + 3]]) for i, p in enumerate(PROMPTS)]
    logps = torch.tensor([x for s in got for x in s.logps])
    batch = pack(groups, row=64)
    assert batch.target.tolist() == [i for s in got for i in s.ids] and batch.count == len(got) == 12
    assert (logps - expected(model, groups, temperature)).abs().max() < 1e-5
    with torch.no_grad():
        assert (logps - token_logps(model, batch, temperature)).abs().max() < 1e-5
    assert len({tuple(s.ids) for s in got}) > 6


@pytest.mark.parametrize("bad", [dict(temperature=0.0), dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.5)])
def test_G3_temperature_and_top_p_out_of_range_are_errors(bad):
    with pytest.raises(ValueError, match="temperature > 0"):
        sample(build("llama"), PROMPTS, 1, 2, [2], **bad)


def chi_square(counts, p):
    p = torch.as_tensor(p).double()
    statistic = ((counts - counts.sum() * p) ** 2 / (counts.sum() * p)).sum()
    return statistic, len(p) - 1 + 5 * math.sqrt(2 * (len(p) - 1))


def test_G2_draws_follow_the_softmax_and_reach_every_token():
    logits = 0.8 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    u = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.bincount(draw(logits.softmax(-1).expand(20000, -1), u), minlength=200)
    statistic, bound = chi_square(counts, logits.double().softmax(-1))
    assert statistic < bound and (counts > 0).all()
    edge = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)          # never a token of probability 0
    u = torch.tensor([0.0, 0.2499, 0.25, 1 - 2 ** -53], dtype=torch.float64)  # … even at the ends
    assert draw(edge, u).tolist() == [1, 1, 3, 3]


def test_G2_a_poisoned_generation_config_is_ignored():
    model = build("llama")
    p = model(input_ids=torch.tensor([PROMPTS[3]])).logits[0, -1].double().softmax(-1).detach()
    before = model.generation_config.to_dict()
    poison = dict(do_sample=True, temperature=0.6, top_p=0.33, top_k=7, repetition_penalty=1.5, min_p=0.2)
    try:
        model.generation_config.update(**poison)
        samples = sample(model, [PROMPTS[3]], 4000, 1, [2], seed=2)
    finally:
        model.generation_config.update(**before)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=V)
    order = p.argsort(descending=True)
    keep = order[p[order] * 4000 >= 5]                       # the rare tokens together are one cell
    cells = torch.cat([counts[keep], (4000 - counts[keep].sum())[None]])
    q = torch.cat([p[keep], (1 - p[keep].sum())[None]])
    statistic, bound = chi_square(cells, q)
    assert statistic < bound and (counts > 0).sum() > 60 and cells[-1] > 0


def test_G4_top_p_keeps_the_smallest_set_and_the_logps_are_of_the_full_softmax():
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    u = torch.linspace(0, 1, 8001, dtype=torch.float64)[:-1]
    cases = {0.3: {1: 1.0}, 0.79: {1: 5 / 8, 3: 3 / 8}, 0.81: {0: 0.15 / 0.95, 1: 0.5 / 0.95, 3: 0.3 / 0.95}}
    for top_p, kept in cases.items():
        fraction = torch.bincount(draw(probs.expand(8000, -1), u, top_p), minlength=4) / 8000
        assert all(abs(fraction[i] - kept.get(i, 0)) < 1e-3 for i in range(4))
    model = build("llama")
    got = sample(model, PROMPTS, 4, 6, [2], top_p=0.4, seed=1)
    assert len(got) == 16
    for i, s in enumerate(got):
        prompt = PROMPTS[i // 4]
        logits = model(input_ids=torch.tensor([prompt + s.ids])).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
        logp = logits.gather(1, torch.tensor(s.ids)[:, None])
        assert (logp[:, 0] - torch.tensor(s.logps)).abs().max() < 1e-5
        more_likely = torch.where(logits > logp, logits.exp(), 0).sum(-1)     # they hold less than top_p
        assert (more_likely < 0.4 + 1e-6).all()


def test_A5_every_stop_ends_a_completion_and_only_a_stop_does():
    model = build("llama")
    prompt = PROMPTS[0]
    ids = greedy_reference(model, prompt, [], 6)
    [truncated] = sample(model, [prompt], 1, 6, [0], greedy=True)
    assert truncated.ids == ids and not truncated.ended and len(truncated.logps) == 6
    for stop in set(ids):
        stops = [0, stop, prompt[0]] if prompt[0] not in ids else [0, stop]
        [got] = sample(model, [prompt], 1, 6, stops, greedy=True)
        assert got.ended and got.ids == ids[:ids.index(stop) + 1] and len(got.logps) == len(got.ids)
    only = sample(model, [prompt, prompt], 2, 6, [ids[0]], greedy=True)       # all rows end at once: one token each
    assert [s.ids for s in only] == [ids[:1]] * 4 and only[3].ended


def test_D10_samples_depend_on_the_seed_and_not_on_batches_or_global_state():
    def run(seed=3, **more):
        return sample(build("llama"), PROMPTS, 3, 16, list(range(3, 30)), seed=seed, **more)

    def ids(samples):
        return [s.ids for s in samples]

    first = run()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = run()
    assert first == again and torch.equal(torch.get_rng_state(), state)
    assert ids(run(seed=4)) != ids(first) and len({len(s.ids) for s in first}) > 3
    for cache_tokens in (1, 120, 200):                       # one prompt a batch, two, …
        other = run(cache_tokens=cache_tokens)
        assert ids(other) == ids(first)
        for s, t in zip(other, first):
            assert all(abs(a - b) < 1e-5 for a, b in zip(s.logps, t.logps))
    assert sample(build("llama"), [], 3, 4, [2]) == []

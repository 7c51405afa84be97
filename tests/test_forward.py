"""Sections ③ to ⑦ of common.py: plan, pack, log-probs, sample. Every expectation is computed here,
by the plain forward of one row.

The models are tiny and random, with weights scaled up so that their log-probs really vary. A22, B1,
G5, … are the traps that a test keeps out.
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
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from common import Group, attention_mask, can_pack, sample, sum_by, token_logps

V = 131
LLAMA = dict(
    vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
    eos_token_id=2)
WINDOW = dict(LLAMA, head_dim=16, sliding_window=16)
GPT2 = dict(vocab_size=V, n_embd=64, n_layer=3, n_head=4)
NEOX = dict(vocab_size=V, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
ROUTER = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
MODELS = {                       # name: (model type, config); a dash names a variation
    "gemma2": ("gemma2", dict(WINDOW, final_logit_softcapping=2.0)),         # eager attention
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", dict(LLAMA, tie_word_embeddings=True)),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", dict(LLAMA, head_dim=16)),
    "qwen3_moe": ("qwen3_moe", dict(LLAMA, head_dim=16, **EXPERTS)),
    "mixtral-router": ("mixtral", dict(LLAMA, **ROUTER)),
    "mistral": ("mistral", WINDOW),
    "gemma3": ("gemma3_text", dict(WINDOW, layer_types=ALTERNATING)),
    "gemma3-cap": ("gemma3_text", dict(WINDOW, final_logit_softcapping=2.0)),
    "phi3": ("phi3", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "phi-head-bias": ("phi", dict(NEOX, intermediate_size=96)),
    "gpt_neox": ("gpt_neox", dict(NEOX, intermediate_size=96)),
    "opt": ("opt", dict(NEOX, ffn_dim=96, word_embed_proj_dim=64)),
    "cohere": ("cohere", dict(LLAMA, logit_scale=0.4)),
    "granite": ("granite", dict(LLAMA, logits_scaling=0.4)),
}
MAMBA = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)
OTHERS = {                       # not to be packed, but correct when padded
    "bloom": ("bloom", dict(vocab_size=V, hidden_size=64, n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2)),
    "falcon_h1": ("falcon_h1", dict(LLAMA, **MAMBA)),
    "gpt_neo": ("gpt_neo", dict(
        vocab_size=V, hidden_size=64, num_layers=2, num_heads=4, window_size=16,
        attention_types=[[["global", "local"], 1]])),
    "lfm2": ("lfm2", dict(LLAMA, layer_types=["conv", "full_attention", "conv"])),
}
SPEC = [(5, (3, 7)), (30, (20, 4)), (1, (1, 2)), (12, (40, 41, 3)), (9, (1,))]   # lengths


@functools.cache
def build(name):
    torch.manual_seed(sum(map(ord, name)))
    model_type, config = (MODELS | OTHERS)[name]
    config = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():              # biases and norms are 0 and 1 when new
            if p.dim() > 1 and "conv" not in key:
                p.mul_(6)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def group(prompt_ids, completion_ids):
    return Group("", [], prompt_ids=prompt_ids, completion_ids=completion_ids)


def make(spec, seed=0, vocab=V):
    r = random.Random(seed)

    def ids(n):
        return [r.randrange(3, vocab) for _ in range(n)]

    return [group(ids(prompt), [ids(n) for n in completions]) for prompt, completions in spec]


def lay(groups, packed=True, hidden=64):
    """lay_out() as for a model of that width: the wider, the longer its rows may be."""
    model = SimpleNamespace(device="cpu", config=SimpleNamespace(hidden_size=hidden))
    return common.lay_out(model, groups, packed)


def scattered(groups):
    """One tree a row, hardly a prompt shared: as much padding as there can be."""
    return common.assemble([[tree] for tree in common.trees_of(groups, 0)], True, "cpu")


def forward(model, ids):
    """The logits behind each id by the plain forward of one row, in float64: (n, V)."""
    out = model(input_ids=torch.tensor([ids]), use_cache=False, output_router_logits=False)
    return out.logits[0].double()


def alone(model, prompt, ids, temperature=1.0):
    """Log-probs of one completion behind its prompt: (T,)."""
    logp = (forward(model, prompt + ids)[len(prompt) - 1:-1] / temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def expected(model, groups, temperature=1.0):
    return torch.cat([
        alone(model, g.prompt_ids, ids, temperature) for g in groups for ids in g.completion_ids])


def gradient(model, scalar):
    model.zero_grad(set_to_none=True)
    scalar.backward()
    return torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def close(a, b, tolerance=1e-5):
    """Relative to the largest entry: what float32 can promise for sums in another order."""
    return (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1)


# ③ plan -------------------------------------------------------------------------------------------

def plan(n, batch, epochs=1, max_steps=0, seed=3):
    return common.make_plan(n, SimpleNamespace(
        batch_size=batch, epochs=epochs, max_steps=max_steps, seed=seed))


@pytest.mark.parametrize("n, batch, epochs, max_steps, sizes", [
    (10, 8, 3, 0, [8, 2] * 3),                               # B16: six updates
    (3, 8, 1, 0, [3]),
    (10, 4, 1, 7, [4, 4, 2, 4, 4, 2, 4]),
    (10, 4, 5, 2, [4, 4]),
])
def test_B16_every_row_once_an_epoch_and_the_ragged_step_kept(n, batch, epochs, max_steps, sizes):
    steps = plan(n, batch, epochs, max_steps)
    assert [len(step) for step in steps] == sizes
    flat = [i for step in steps for i in step]
    for start in range(0, len(flat), n):
        epoch = flat[start:start + n]
        assert len(set(epoch)) == len(epoch) and (len(epoch) < n or set(epoch) == set(range(n)))


def test_D10_the_plan_is_a_pure_function_of_the_seed():
    a = plan(50, 8, 2)
    random.seed(99)
    state = random.getstate()
    assert a == plan(50, 8, 2) != plan(50, 8, 2, seed=4) and random.getstate() == state
    assert a[:7] == plan(50, 8) and a[7:] != a[:7]           # every epoch: another permutation
    with pytest.raises(SystemExit):
        plan(0, 8)


@pytest.mark.parametrize("budget", [1, 64, 100, 10 ** 6])
def test_micro_batches_keep_the_budget_and_every_group(budget):
    groups = make(SPEC + [(3, (k,)) for k in range(1, 20)])
    for packed in (True, False):                             # padded, every prompt is repeated
        batches = common.micro_batches(groups, budget, packed)
        assert sorted(id(g) for b in batches for g in b) == sorted(map(id, groups))
        assert len(batches) == {1: len(groups), 10 ** 6: 1}.get(budget, len(batches))
        for b in batches:
            repeats = 1 if packed else len(b[0].completion_ids)
            size = sum(len(g.prompt_ids) * repeats + sum(map(len, g.completion_ids)) for g in b)
            assert size <= budget or len(b) == 1


# ④ pack -------------------------------------------------------------------------------------------

def numbered(spec):
    """Groups in which every token has its own id, and what it stands for: (group, completion or
    None, position)."""
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
def test_a_row_holds_each_prompt_and_completion_once_with_little_padding(seed):
    r = random.Random(seed)
    spec = []
    for _ in range(40):
        prompt = r.randint(1, 80)
        spec.append((prompt, [r.randint(1, 60) for _ in range(r.randint(1, 4))]))
    groups, what = numbered(spec)
    batch = common.assemble(common.balanced_rows(groups, 10 ** 9), True, "cpu")
    flat = batch.input_ids.flatten().tolist()
    assert len(batch.input_ids) > 1 and flat.count(0) < 0.05 * len(flat)
    assert sorted(i for i in flat if i) == sorted(what)      # nothing lost, nothing twice
    assert all(what[i][2] == p for i, p in zip(flat, batch.positions.flatten().tolist()) if i)

    completions = [ids for g in groups for ids in g.completion_ids]
    target = batch.target.tolist()
    for k, ids in enumerate(completions):
        assert [t for t, owner in zip(target, batch.owner.tolist()) if owner == k] == ids
    assert [flat[i] for i in batch.last] == [ids[-1] for ids in completions]
    before = {}
    for g in groups:
        for ids in g.completion_ids:
            before |= dict(zip(ids, g.prompt_ids[-1:] + ids))
    assert [flat[i] for i in batch.read] == [before[t] for t in target]
    counts = sum_by(torch.ones(len(target)), batch.owner, len(batch.last))
    assert counts.tolist() == [len(ids) for ids in completions]


@pytest.mark.parametrize("prompt, completion, even", [
    (800, 50, 384), (15, 128, 384), (15, 128, 24576), (300, 40, 3072)])
def test_a_prompt_is_shared_as_far_as_that_is_cheapest(prompt, completion, even):
    """Against tokens × (1 + row length / even) itself, for every number of completions a tree."""
    cost = {}
    for m in range(1, 33):
        cost[m] = (prompt / m + completion) * (1 + (prompt + m * completion) / even)
    trees = common.trees_of([group([1] * prompt, [[2] * completion] * 32)], even)
    assert sorted(k for _, branches in trees for k, _ in branches) == list(range(32))
    assert min(cost.values()) <= cost[round(32 / len(trees))] <= 1.1 * min(cost.values())


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("window, layers, types", [
    (None, None, [FULL]), (4, None, [SLIDING]), (4, [FULL] * 2, [FULL]),
    (4, [SLIDING, FULL], [SLIDING, FULL])])
def test_attention_mask_equals_brute_force(window, layers, types):
    groups, what = numbered([(3, (4, 6)), (1, (2, 1, 3)), (5, (2,))])
    batch = common.assemble(
        [common.trees_of(some, 10 ** 9) for some in (groups[:1], groups[1:])], True, "cpu")
    masks = attention_mask(batch, SimpleNamespace(sliding_window=window, layer_types=layers))
    masks = masks if len(types) > 1 else {types[0]: masks}   # one for all layers, or one a type
    rows, n = batch.input_ids.shape
    assert set(masks) == set(types) and (batch.input_ids == 0).any()
    for name, mask in masks.items():
        assert mask.shape == (rows, 1, n, n) and mask.dtype == torch.bool
        for r, row in enumerate(batch.input_ids.tolist()):
            for q, a in enumerate(row):
                sees = mask[r, 0, q].tolist()
                if a == 0:                                   # no softmax over nothing
                    assert any(sees) and not any(s and b for s, b in zip(sees, row))
                    continue
                g, c, p = what[a]
                for b, s in zip(row, sees):
                    h, d, o = what.get(b, (None, None, 0))
                    near = name == FULL or p - o < window
                    assert s == (g == h and d in (None, c) and o <= p and near)


# ⑤ log-probs --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_B1_known_models_are_packed_and_packed_equals_padded_equals_alone(name, capsys):
    model = build(name)
    groups = make(SPEC)
    want = expected(model, groups)
    assert want.std() > 0.3
    with torch.no_grad():
        one_row = lay(groups, hidden=10 ** 6)
        for layout in (lay(groups), one_row, scattered(groups), lay(groups, False)):
            got = token_logps(model, layout)
            assert got.dtype == torch.float32 and (got - want).abs().max() < 3e-5
        cool = expected(model, groups, 0.7)
        assert (token_logps(model, lay(groups), 0.7) - cool).abs().max() < 5e-5
    assert can_pack(model, groups) and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_found_out_and_correct_when_padded(name, capsys):
    model = build(name)
    groups = make(SPEC)
    assert not can_pack(model, groups) and "padded, slower but correct" in capsys.readouterr().out
    with torch.no_grad():
        got = token_logps(model, lay(groups, False))
    assert (got - expected(model, groups)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["llama-tied", "mistral", "gemma3-cap", "phi-head-bias", "gpt2", "cohere"])
def test_B15_the_gradient_depends_neither_on_layout_nor_on_chunks_nor_on_the_budget(
        name, monkeypatch):
    model = build(name)
    groups = make(SPEC + [(4, (6, 2)), (2, (5, 9)), (7, (3, 3))])
    weight = {}                                              # so that nothing cancels or hides
    for g in groups:
        factors = torch.randn(3, generator=torch.Generator().manual_seed(7)).tolist()
        weight |= {id(ids): factor for ids, factor in zip(g.completion_ids, factors)}

    def loss(some, layout=lay):
        w = torch.tensor([weight[id(ids)] for g in some for ids in g.completion_ids])
        return (w * common.completion_logps(model, layout(some))).sum()

    want = gradient(model, sum(
        weight[id(ids)] * alone(model, g.prompt_ids, ids).sum()
        for g in groups for ids in g.completion_ids))
    assert want.abs().max() > 0.1
    for layout in (lay, scattered, functools.partial(lay, packed=False)):
        assert close(gradient(model, loss(groups, layout)), want)
    counts = set()
    for budget in (1, 120, 10 ** 6):                         # micro-batches of one group, … all
        micro = common.micro_batches(groups, budget)
        counts.add(len(micro))
        assert close(gradient(model, sum(map(loss, micro))), want)
    assert {1, len(groups)} < counts
    for rows in (1, 7, 50):
        monkeypatch.setattr(common, "CHUNK", rows * V)
        assert close(gradient(model, loss(groups)), want)


def test_log_softmax_in_the_memory_of_the_logits_against_float64():
    torch.manual_seed(0)
    logits = (30 * torch.randn(40, 50)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    target = torch.randint(50, (40,))
    weight = torch.randn(40)
    want = exact.log_softmax(1).gather(1, target[:, None])[:, 0]
    got = common.GatherLogSoftmax.apply(logits * 1, target)
    assert close(got, want, 1e-6)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert close(logits.grad, exact.grad, 1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 10 ** 6])
def test_for_all_gives_a_value_a_token_or_a_completion_of_each_group_in_order(budget, packed):
    model = build("llama")
    groups = make(SPEC + [(2, (1, 1)), (3, (1,)), (6, (1, 1, 1))])       # … and of one token only
    options = (model, groups, SimpleNamespace(micro_batch_tokens=budget), packed,
               contextlib.nullcontext())
    by_token = common.for_all(token_logps, *options)
    by_completion = common.for_all(common.completion_logps, *options)
    for g, values, sums in zip(groups, by_token, by_completion, strict=True):
        want = expected(model, [g])
        assert (torch.tensor(values) - want).abs().max() < 2e-5
        want = [part.sum() for part in want.split(list(map(len, g.completion_ids)))]
        assert (torch.tensor(sums) - torch.stack(want)).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [True, False])
def test_B2_B18_prompt_and_padding_never_reach_the_result(packed):
    model = build("llama")
    groups, what = numbered([(5, (3, 7)), (2, (9, 4)), (20, (6,)), (1, (2,)), (6, (5,))])
    batch = scattered(groups) if packed else lay(groups, False)
    ends = {g.prompt_ids[-1] for g in groups}
    inside = [i for i, (_, completion, _) in what.items() if completion is None and i not in ends]
    prompt = torch.isin(batch.input_ids, torch.tensor(inside))
    padding = batch.input_ids == 0
    assert prompt.any() and padding.any()

    def spoilt(value, where):
        """token_logps with `value` in hidden states (packed) or logits (padded), and a gradient."""
        def hook(module, inputs, output):
            key = "last_hidden_state" if packed else "logits"
            output[key] = torch.where(where[..., None], value, output[key])
            return output

        handle = (model.model if packed else model).register_forward_hook(hook)
        with contextlib.closing(SimpleNamespace(close=handle.remove)):
            logps = token_logps(model, batch)
            gradient(model, logps.sum())
        return logps.detach(), model.lm_head.weight.grad

    clean, its_gradient = spoilt(0.0, torch.zeros_like(padding))
    for value, where in ((1e4, prompt), (math.nan, padding), (math.nan, prompt | padding)):
        got, head = spoilt(value, where)
        assert torch.equal(got, clean) and torch.equal(head, its_gradient)


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_B3_the_softmax_of_bfloat16_logits_is_float32(mode):
    torch.manual_seed(0)
    config = dict(LLAMA, vocab_size=4096, max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    model.lm_head.weight.data.mul_(20)
    model = model.bfloat16() if mode == "weights" else model
    groups = make([(3, (990,)), (2, (10, 5))], vocab=4096)
    logits = []
    model.lm_head.register_forward_hook(lambda m, i, output: logits.append(output.flatten(0, -2)))
    for batch in (lay(groups), lay(groups, False)):
        logits.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = token_logps(model, batch)
        own = torch.cat(logits) if batch.packed else torch.cat(logits)[batch.read]
        assert own.dtype == torch.bfloat16 and got.dtype == torch.float32
        want = own.double().log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        assert want.std() > 0.3 and (got - want).abs().max() < 1e-3
        assert abs(sum_by(got, batch.owner, 3)[0] - want[:990].sum()) < 1e-2


def test_B4_the_backward_keeps_the_logits_of_one_chunk_once(monkeypatch):
    model = build("llama")
    vocab = 2048
    batch = lay(make([(4, (512,))]))
    head = torch.nn.Linear(64, vocab, bias=False)
    leaf = torch.randn(batch.input_ids.numel(), 64, requires_grad=True)
    monkeypatch.setattr(common, "hidden_states", lambda model, batch: leaf)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: head)
    results = []
    for rows in (512, 16):
        monkeypatch.setattr(common, "CHUNK", rows * vocab)
        kept = {}

        def keep(tensor, kept=kept):
            if tensor.data_ptr() != head.weight.data_ptr():
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logps = token_logps(model, batch)
        leaf.grad = None
        gradient(head, (logps * torch.linspace(-1, 1, 512)).sum())
        results.append((sum(kept.values()), logps.detach(), leaf.grad.clone(), head.weight.grad))
    (full, *want), (chunked, *got) = results
    assert 0.9 < full / (512 * vocab * 4) < 1.2 and chunked < 0.1 * full
    assert all(close(a, b, 1e-6) for a, b in zip(got, want))


# ⑦ sample -----------------------------------------------------------------------------------------

PROMPTS = [g.prompt_ids for g in make([(9, ()), (1, ()), (30, ()), (4, ())], seed=5)]
MANY = list(range(3, 30))                                    # stops at which rows end all the time
CACHED = ["llama", "qwen2", "qwen3", "gpt2", "opt", "mistral", "gemma2", "gemma3", "mixtral-router",
          "bloom", "falcon_h1", "lfm2"]


@torch.no_grad()
def by_hand(model, prompt, limit, stops, temperature=1.0, u=None):
    """One completion without a cache and without a batch: greedy, or by inverting the CDF at u."""
    ids = []
    while len(ids) < limit and ids[-1:] not in [[stop] for stop in stops]:
        logits = forward(model, prompt + ids)[-1]
        cdf = (logits / temperature).softmax(-1).cumsum(0)
        token = logits.argmax()
        if u is not None:
            token = torch.searchsorted(cdf, u[len(ids)] * cdf[-1], right=True)
        ids.append(int(token))
    return ids


@pytest.mark.parametrize("name", CACHED)
def test_A22_A23_G1_greedy_in_a_batch_is_step_by_step_argmax_without_cache(name):
    """Unequal prompts, padded on the left, past the sliding window, rows that leave early."""
    model = build(name)
    stops = MANY[:8]
    got = sample(model, PROMPTS, 2, 24, stops, temperature=0)
    want = [by_hand(model, p, 24, stops) for p in PROMPTS]
    assert [s.ids for s in got] == [ids for ids in want for _ in range(2)]   # prompt 0 twice, …
    assert [s.ended for s in got[::2]] == [ids[-1] in stops for ids in want]
    for prompt, s in zip(PROMPTS, got[1::2]):
        logps = expected(model, [group(prompt, [s.ids])])
        assert (torch.tensor(s.logps) - logps).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_G3_G5_G8_a_batch_gives_what_each_prompt_gives_alone(name, temperature):
    """And the log-probs of the samples are those of the training's forward."""
    model = build(name)
    got = sample(model, PROMPTS, 3, 12, MANY, temperature, seed=1)
    u = torch.rand((4, 3, 12), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert len({len(s.ids) for s in got}) > 2
    for i, s in enumerate(got):
        assert s.ids == by_hand(model, PROMPTS[i // 3], 12, MANY, temperature, u[i // 3, i % 3])
        assert s.ended == (s.ids[-1] in MANY)
    groups = [group(p, [s.ids for s in got[3 * i:3 * i + 3]]) for i, p in enumerate(PROMPTS)]
    logps = torch.tensor([logp for s in got for logp in s.logps])
    assert (logps - expected(model, groups, temperature)).abs().max() < 2e-5
    with torch.no_grad():
        assert (logps - token_logps(model, lay(groups), temperature)).abs().max() < 2e-5


def test_sampling_without_a_cache_or_of_weights_that_diverged_is_refused_in_a_sentence(capsys):
    sick = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)).eval()
    sick.lm_head.weight.data[5] = math.nan
    for model, words in ((build("mamba"), "past_key_values"), (sick, "not finite")):
        with pytest.raises(SystemExit):
            sample(model, PROMPTS, 1, 2, [2])
        said = capsys.readouterr().err
        assert words in said and said.startswith("error: ") and said.count("\n") == 1


def unlikely(counts, p):
    """Whether counts are more than five standard errors from probabilities p, by χ²."""
    statistic = ((counts - counts.sum() * p) ** 2 / (counts.sum() * p)).sum()
    return statistic > len(p) - 1 + 5 * math.sqrt(2 * (len(p) - 1))


def test_G2_inverse_cdf_follows_the_softmax_and_reaches_every_token():
    logits = 0.8 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    u = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = common.inverse_cdf(logits.softmax(-1).expand(20000, -1), u)
    counts = torch.bincount(drawn, minlength=200)
    assert not unlikely(counts, logits.double().softmax(-1)) and (counts > 0).all()
    edge = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)         # never a token of
    u = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2 ** -53], dtype=torch.float64)     # probability 0
    assert common.inverse_cdf(edge, u).tolist() == [1, 1, 3, 3]


def test_D10_samples_depend_on_the_seed_and_not_on_batches_or_global_state(monkeypatch):
    def run(seed=3):
        return sample(build("llama"), PROMPTS, 3, 16, MANY, seed=seed)

    first = run()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert first == run() and torch.equal(torch.get_rng_state(), state)
    ids = [s.ids for s in first]
    assert [s.ids for s in run(seed=4)] != ids and len(set(map(len, ids))) > 3
    for tokens in (1, 120, 200):                             # one prompt a batch, two, …
        monkeypatch.setattr(common, "CACHE", tokens)
        assert [s.ids for s in run()] == ids
    assert sample(build("llama"), [], 3, 4, [2]) == []


@pytest.fixture
def paged(monkeypatch):
    """sample_paged() with a small cache: to make the default one takes 20 s on a CPU."""
    small = functools.partial(common.ContinuousBatchingConfig, num_blocks=64, max_batch_tokens=512)
    monkeypatch.setattr(common, "ContinuousBatchingConfig", small)
    return common.sample_paged


def test_G2_paged_samples_are_those_of_the_plain_loop_in_distribution(paged):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **dict(LLAMA, vocab_size=4, pad_token_id=None))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data.mul_(4)
    model.generation_config.update(                          # what a checkpoint says is ignored
        do_sample=True, temperature=0.6, top_p=0.33, top_k=2, repetition_penalty=1.5, min_p=0.2)
    prompts = [[1, 3], [0, 1, 1], [1, 3]]                    # two are the same
    got, again, other = [paged(model, prompts, 90, 3, [2], 0.8, seed) for seed in (7, 7, 8)]
    assert [s.ids for s in got] == [s.ids for s in again] != [s.ids for s in other]
    assert len(got) == 270 and {len(s.ids) for s in got} == {1, 2, 3}
    for s in got:
        assert s.ended == (s.ids[-1] == 2) and 2 not in s.ids[:-1]
        assert s.ended or len(s.ids) == 3
    groups = [group(p, [s.ids for s in got[90 * i:][:90]]) for i, p in enumerate(prompts)]
    logps = torch.tensor([logp for s in got for logp in s.logps])
    assert (logps - expected(model, groups, 0.8)).abs().max() < 1e-4

    plain = sample(model, prompts, 90, 3, [2], 0.8, seed=7)
    for some in (got, plain):
        for i, prompt in enumerate(prompts):
            p = (forward(model, prompt)[-1].detach() / 0.8).softmax(-1)
            first_ids = torch.tensor([s.ids[0] for s in some[90 * i:][:90]])
            assert not unlikely(torch.bincount(first_ids, minlength=4), p)

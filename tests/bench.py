"""How fast, how much memory, and how far from the floor. Prints ratios; asserts nothing.

    python tests/bench.py dpo --model DIR --data pairs.jsonl [--batch-size 8] [--steps 6] [--against "COMMAND"]
    python tests/bench.py rm  --model DIR --data pairs.jsonl …
    python tests/bench.py grpo --model DIR --data prompts.jsonl [--group-size 8] [--max-new-tokens 128] …
    python tests/bench.py joy-prompts > prompts.jsonl        # 64 beginnings of stories, for the reward joy below

Trains for --steps steps with the script's own main(), in a process of its own, and prints seconds per step (median, the
first step is warm-up), tokens per second and the peak memory above the loaded model. Then the floor on the same steps: a
bare forward and backward over the tokens that must be computed (each prompt once, the head at completion positions
only, for rm at the last), all logits kept, without recomputation, optimizer or logging. Over 100 % is possible: kept logits
cost time too.
For grpo a step is split into sampling, rewards and update; the reward counts happy words, which costs nothing. Its floor is
the model alone, called with its cache once for every token of the longest answer, and a bare forward of the reference,
forward and backward of the policy over what was sampled.
--against runs another trainer's command and reads the JSON line that it ends with (seconds_per_step, peak_mb_above_model).
"""
import argparse
import importlib
import json
import math
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def joy(completions, **_):
    """How often a story says happy, smile or love: a reward that is easy to game."""
    return [float(sum(c.count(w) for w in ("happy", "smile", "love"))) for c in completions]


def joy_prompts():
    """64 beginnings of stories, 8 heroes × 8 names, as JSON lines."""
    heroes = ("dog", "cat", "bird", "bear", "girl", "boy", "frog", "rabbit")
    names = ("Tim", "Lily", "Tom", "Mia", "Ben", "Sue", "Max", "Anna")
    for hero in heroes:
        for name in names:
            print(json.dumps({"prompt": f"Once upon a time, there was a {hero} named {name}."}))


def train(a):
    """Seconds per step and memory of the script itself, from outside: its log() is called once a step, its loader once."""
    import torch
    import common
    script, loader = importlib.import_module(f"train_{a.what}"), "load_reward_model" if a.what == "rm" else "load_model"
    ticks, peaks, loaded = [], [], []
    log, load_model = script.log, getattr(common, loader)
    script.log = lambda *x: (ticks.append(time.perf_counter()), peaks.append(peak_mb()), log(*x))

    def load_and_note(*x, **more):
        model = load_model(*x, **more)
        sum(p.sum().item() for p in model.parameters())      # a checkpoint is mapped, not read: touch it, or it counts as training's
        loaded.append(peak_mb())
        return model
    setattr(common, loader, load_and_note)
    more = []
    if a.what == "grpo":
        more = ["--reward", f"{__file__}:joy", "--group-size", str(a.group_size), "--max-new-tokens", str(a.max_new_tokens)]
    with tempfile.TemporaryDirectory() as out:
        script.main(["--model", a.model, "--dataset", a.data, "--batch-size", str(a.batch_size), "--max-steps", str(a.steps), "--learning-rate", "1e-6",
                     "--lr-schedule", "constant", "--warmup-steps", "0", "--eval-fraction", "0", "--max-length", "4096", "--output-dir", out,
                     "--micro-batch-tokens", str(a.micro_batch_tokens), *more])
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    if a.what == "grpo":
        split = {name: statistics.median(x[f"seconds/{name}"] for x in lines[1:]) for name in ("sample", "reward", "update")}
        more = {"split": split, "sample_tokens_per_second": round(statistics.median(x["sample_tokens_per_second"] for x in lines[1:]))}
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if torch.cuda.is_available() else peaks[-1] - loaded[0]      # of training, not of saving
    return {"seconds_per_step": statistics.median(y - x for x, y in zip(ticks, ticks[1:])), "peak_mb_above_model": round(memory),
            "tokens_per_second": round(statistics.median(x["tokens_per_second"] for x in lines[1:])), "losses": [round(x["loss"], 5) for x in lines], **dict(more)}


def floor(a):
    """Our step and the bare one in turn, on the same groups and in one process, so that a noisy machine hits both alike."""
    import torch
    import torch.nn.functional as F
    import common
    script = importlib.import_module(f"train_{a.what}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, args = common.load_encoder(a.model), script.parse_args([])
    pairs = [name for name, row in common.FORMATS.items() if row.gives == "pair"]
    groups, account = common.read_groups(a.data, pairs)
    groups = common.tokenise(groups, account, encoder, 4096)
    ref_logps = torch.zeros(common.number_completions(groups))
    if a.what == "rm":
        model = common.load_reward_model(a.model, encoder, device, new_head=True)
    else:
        model = common.load_model(a.model, encoder, device)
    seconds = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def ours(micro):
        """Our loss of a micro-batch, its gradient ready."""
        with autocast:
            batch = common.lay_out(model, micro, True)
            values = (common.reward_scores if a.what == "rm" else common.completion_logps)(model, batch)
        return script.micro_loss(values, *([ref_logps, 0.0] if a.what == "dpo" else []), micro, args)[0]

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    computed = tokens = 0
    for step in common.Plan(len(groups), a.batch_size, 1, a.steps, 0):
        chosen, began = [groups[i] for i in step], clock()
        optimizer.zero_grad(set_to_none=True)
        for micro in common.micro_batches(chosen, a.micro_batch_tokens):
            (ours(micro) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        between = clock()
        optimizer.zero_grad(set_to_none=True)
        for micro in common.micro_batches(chosen, a.micro_batch_tokens):
            batch = common.lay_out(model, micro, True).to(device)
            computed += batch.input_ids.numel()
            tokens += sum(g.tokens() for g in micro)
            with autocast:
                hidden = common.hidden_states(model, batch)
                if a.what == "rm":
                    F.softplus(model.score(hidden[batch.last]).view(-1, 2).diff()).sum().backward()
                else:
                    F.cross_entropy(common.head_logits(model, hidden[batch.read]), batch.target, reduction="sum").backward()
        seconds.append((between - began, clock() - between))
    all_ours, bare = zip(*seconds[1:])                           # the first step is warm-up
    return {"seconds_per_step": statistics.median(bare), "speed": sum(bare) / sum(all_ours), "overhead": computed / tokens - 1}


def floor_grpo(a):
    """As floor(), for both halves of a step: what is sampled by sample() is what the bare update computes."""
    import torch
    import torch.nn.functional as F
    import common
    import train_grpo as script
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, args = common.load_encoder(a.model), script.parse_args(["--micro-batch-tokens", str(a.micro_batch_tokens)])
    groups, account = common.read_groups(a.data, ("prompt",))
    groups = common.tokenise(groups, account, encoder, 4096 - a.max_new_tokens)
    model = common.load_model(a.model, encoder, device)
    reference = common.load_model(a.model, encoder, device).requires_grad_(False)
    optimizer, seconds = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for step, rows in enumerate(common.Plan(len(groups), a.batch_size, 1, a.steps, 0)):
        chosen, times = [groups[i] for i in rows], [clock()]
        with autocast:
            samples = common.sample(model, [g.prompt_ids for g in chosen], a.group_size, a.max_new_tokens, encoder.stops, seed=step)
        times.append(clock())
        with torch.no_grad(), autocast:                      # every prompt as long as the longest: a plain loop has nothing better
            ids = torch.tensor([(g.prompt_ids * 4096)[:max(len(g.prompt_ids) for g in chosen)] for g in chosen], device=device)
            cache = model(input_ids=ids, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(a.group_size)
            for _ in range(max(len(s.ids) for s in samples) - 1):
                model(input_ids=ids[:, :1].repeat_interleave(a.group_size, 0), past_key_values=cache, logits_to_keep=1)
        times.append(clock())
        pieces = []                                          # as the script: groups with their samples, numbered
        for k, s in enumerate(samples):
            if k % a.group_size == 0:
                pieces.append(replace(chosen[k // a.group_size], completion_ids=[], index=[]))
            pieces[-1].completion_ids.append(s.ids)
            pieces[-1].index.append(k)
        lengths = torch.tensor([len(s.ids) for s in samples])
        ones = torch.ones(int(lengths.sum()))
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        times.append(clock())
        optimizer.zero_grad(set_to_none=True)
        ref = script.log_probs(reference, [pieces], lengths, args, True, autocast)
        tokens = script.Tokens(ones, ones, math.nan * ones, ref, owner, lengths)
        micros = common.micro_batches(pieces, a.micro_batch_tokens)
        for micro in micros:
            with autocast:
                logp = common.token_logps(model, common.lay_out(model, micro, True))
            script.micro_loss(tokens.of(micro, logp), args)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(clock())
        optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            batch = common.lay_out(model, micro, True).to(device)
            with torch.no_grad(), autocast:
                common.head_logits(reference, common.hidden_states(reference, batch)[batch.read])
            with autocast:
                F.cross_entropy(common.head_logits(model, common.hidden_states(model, batch)[batch.read]), batch.target).backward()
        times.append(clock())
        seconds.append((times[1] - times[0], times[2] - times[1], times[4] - times[3], times[5] - times[4]))
    sampling, bare_sampling, update, bare_update = (sum(x) for x in zip(*seconds[1:]))
    steps = len(seconds) - 1
    return {"seconds_per_step": (bare_sampling + bare_update) / steps, "speed": (bare_sampling + bare_update) / (sampling + update),
            "split": {"sampling": bare_sampling / sampling, "update": bare_update / update}}


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("what", choices=["dpo", "rm", "grpo", "joy-prompts"])
    p.add_argument("--model")
    p.add_argument("--data")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-tokens", type=int, default=8192)
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--against", help="command of another trainer on the same work; its last line is JSON")
    p.add_argument("--part", choices=["train", "floor"], help=argparse.SUPPRESS)         # one measurement, one process
    a = p.parse_args()
    if a.what == "joy-prompts":
        return joy_prompts()
    if not (a.model and a.data):
        p.error("--model and --data are needed")
    if a.part:
        print(json.dumps((train if a.part == "train" else floor_grpo if a.what == "grpo" else floor)(a)))
        return

    def measure(command):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    ours = measure([sys.executable, *sys.argv, "--part", "train"])
    print(f"{a.what}: {ours['seconds_per_step']:.2f} s a step of {a.batch_size} groups, {ours['tokens_per_second']:,} tokens/s, peak {ours['peak_mb_above_model']:,} MB above the model")
    if a.what == "grpo":
        print("split: " + ", ".join(f"{k} {v:.3f} s" for k, v in ours["split"].items())
              + f"; sampling {ours['sample_tokens_per_second']:,} tokens/s, update {ours['tokens_per_second']:,} tokens/s")
    bare = measure([sys.executable, *sys.argv, "--part", "floor"])
    print(f"floor: {bare['seconds_per_step']:.2f} s a step; step by step in one process, ours runs at {100 * bare['speed']:.0f} % of the floor's speed"
          + (" (" + ", ".join(f"{k} {100 * v:.0f} %" for k, v in bare["split"].items()) + ")" if a.what == "grpo" else ""))
    if "overhead" in bare:
        print(f"padding and repeated prompts: {100 * bare['overhead']:.0f} % on top of the tokens with each prompt counted once (the floor computes them too)")
    if a.against:
        peer = measure(shlex.split(a.against))
        print(f"against: {peer['seconds_per_step']:.2f} s a step, peak {peer['peak_mb_above_model']:,} MB: ours is {peer['seconds_per_step'] / ours['seconds_per_step']:.1f}× faster "
              f"and takes {peer['peak_mb_above_model'] / ours['peak_mb_above_model']:.1f}× less memory")
        print(f"losses, ours: {ours['losses']}\nlosses, theirs: {[round(x.get('loss', 0), 5) for x in peer.get('log', [])]}")


if __name__ == "__main__":
    main()

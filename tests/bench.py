"""How fast, how much memory, and how far from the floor. Prints ratios; asserts nothing.

    python tests/bench.py dpo                            # on the toy; or --model DIR --data FILE
    python tests/bench.py rm   --model DIR --data pairs.jsonl [--against "COMMAND"]
    python tests/bench.py grpo --model DIR --data prompts.jsonl [--group-size 8] …
    python tests/bench.py joy-prompts > prompts.jsonl    # 64 beginnings of stories, for joy() below

Trains for --steps steps with the script's own main(), in a process of its own, and prints seconds
per step (median, the first step is warm-up), tokens per second and the peak memory above the loaded
model. Then the floor on the same steps: a bare forward and backward over the tokens that must be
computed (each prompt once, the head at completion positions only, for rm at the last), all logits
kept, without recomputation, optimizer or logging. Over 100 % is possible: kept logits cost time too.

For grpo a step is split into sampling, rewards and update; the reward counts happy words, which
costs nothing. Its floor is the model alone, called with its cache once for every token of the
longest completion, and a bare forward of the reference, forward and backward of the policy over
what was sampled.

--against runs another trainer's command and reads the JSON line that it ends with
(seconds_per_step, peak_mb_above_model).
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

TOY = Path(__file__).parent / "toy"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
AUTOCAST = torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


# --- data and reward of the story model -----------------------------------------------------------

def joy(completions, **_):
    """How often a story says happy, smile or love: a reward that is easy to game."""
    counts = []
    for text in completions:
        counts.append(float(sum(text.count(word) for word in ("happy", "smile", "love"))))
    return counts


def joy_prompts():
    """64 beginnings of stories, 8 heroes × 8 names, as JSON lines."""
    for hero in "dog cat bird bear girl boy frog rabbit".split():
        for name in "Tim Lily Tom Mia Ben Sue Max Anna".split():
            text = f"Once upon a time, there was a {hero} named {name}."
            print(json.dumps({"prompt": text}))


# --- one measurement ------------------------------------------------------------------------------

def peak_mb():
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def median(lines, name):
    """Of a metric of all steps but the first."""
    return statistics.median(line[name] for line in lines[1:])


def train(a):
    """The script itself, watched from outside: it calls log() once a step, its loader once."""
    script = importlib.import_module(f"train_{a.what}")
    loader = "load_reward_model" if a.what == "rm" else "load_model"
    log = script.log
    load = getattr(common, loader)
    ticks = []
    peaks = []
    loaded = []

    def log_and_note(*args):
        ticks.append(clock())
        peaks.append(peak_mb())                              # of training, not of saving
        log(*args)

    def load_and_note(*args, **options):
        model = load(*args, **options)
        for p in model.parameters():
            p.sum().item()                                   # a checkpoint is mapped, not read
        loaded.append(peak_mb())
        return model

    script.log = log_and_note
    setattr(common, loader, load_and_note)
    flags = (
        f"--batch-size {a.batch_size} --max-steps {a.steps} --learning-rate 1e-6 --warmup-steps 0 "
        f"--lr-schedule constant --eval-fraction 0 --max-length 4096 "
        f"--micro-batch-tokens {a.micro_batch_tokens} {a.flags}")
    if a.what == "grpo":
        flags += f" --reward {__file__}:joy --group-size {a.group_size}"
        flags += f" --max-new-tokens {a.max_new_tokens}"
    with tempfile.TemporaryDirectory() as out:
        script.main([*flags.split(), "--model", a.model, "--dataset", a.data, "--output-dir", out])
        lines = common.read_lines(Path(out) / "metrics.jsonl")

    result = {
        "seconds_per_step": statistics.median(y - x for x, y in zip(ticks, ticks[1:])),
        "peak_mb_above_model": round(peaks[-1] - loaded[0]),
        "tokens_per_second": round(median(lines, "tokens_per_second")),
        "losses": [round(line["loss"], 5) for line in lines]}
    if a.what == "grpo":
        parts = ("sample", "reward", "update")
        result["split"] = {name: median(lines, f"seconds/{name}") for name in parts}
        result["sample_tokens_per_second"] = round(median(lines, "sample_tokens_per_second"))
    return result


def floor(a):
    """Our step and the bare one in turn, on the same groups and in one process, so that a noisy
    machine hits both alike."""
    script = importlib.import_module(f"train_{a.what}")
    encoder = common.load_encoder(a.model)
    args = script.parse_args([])
    pairs = [name for name, row in common.FORMATS.items() if row.gives == "pair"]
    groups = common.tokenise(*common.read_groups(a.data, pairs), encoder, 4096)
    ref_logps = torch.zeros(common.number_completions(groups))
    measure = common.completion_logps
    if a.what == "rm":
        measure = common.reward_scores
        model = common.load_reward_model(a.model, encoder, DEVICE, new_head=True)
    else:
        model = common.load_model(a.model, encoder, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def ours(micro):
        with AUTOCAST:
            values = measure(model, common.lay_out(model, micro, True))
        if a.what == "rm":
            return script.micro_loss(values, micro, args)[0]
        return script.micro_loss(values, ref_logps, 0.0, micro, args)[0]

    def bare(batch):
        with AUTOCAST:
            hidden = common.hidden_states(model, batch)
            if a.what == "rm":
                return F.softplus(model.score(hidden[batch.last]).view(-1, 2).diff()).sum()
            logits = common.head_logits(model, hidden[batch.read])
            return F.cross_entropy(logits, batch.target, reduction="sum")

    computed = 0
    tokens = 0
    times = []                                               # (ours, bare) of each step
    for step in common.Plan(len(groups), a.batch_size, 1, a.steps, 0):
        chosen = [groups[i] for i in step]
        micros = common.micro_batches(chosen, a.micro_batch_tokens)
        began = clock()
        optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            (ours(micro) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        between = clock()
        optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            batch = common.lay_out(model, micro, True).to(DEVICE)
            computed += batch.input_ids.numel()
            tokens += sum(g.tokens() for g in micro)
            bare(batch).backward()
        times.append((between - began, clock() - between))

    ours_alone, bare_alone = zip(*times[1:])                 # the first step is warm-up
    return {
        "seconds_per_step": statistics.median(bare_alone),
        "speed": sum(bare_alone) / sum(ours_alone),
        "overhead": computed / tokens - 1}


def floor_grpo(a):
    """As floor(), for both halves of a step: what sample() samples is what the bare update
    computes."""
    import train_grpo as script
    encoder = common.load_encoder(a.model)
    args = script.parse_args(["--micro-batch-tokens", str(a.micro_batch_tokens)])
    groups, account = common.read_groups(a.data, ("prompt",))
    groups = common.tokenise(groups, account, encoder, 4096 - a.max_new_tokens)
    model = common.load_model(a.model, encoder, DEVICE)
    reference = common.load_model(a.model, encoder, DEVICE).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def bare_sampling(prompts, tokens):
        """Every prompt as long as the longest: a plain loop has nothing better."""
        width = max(map(len, prompts))
        ids = torch.tensor([(prompt * 4096)[:width] for prompt in prompts], device=DEVICE)
        cache = model(input_ids=ids, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(a.group_size)
        one = ids[:, :1].repeat_interleave(a.group_size, 0)
        for _ in range(tokens - 1):
            model(input_ids=one, past_key_values=cache, logits_to_keep=1)

    def log_prob(policy, batch):
        logits = common.head_logits(policy, common.hidden_states(policy, batch)[batch.read])
        return F.cross_entropy(logits, batch.target)

    times = []
    for step, rows in enumerate(common.Plan(len(groups), a.batch_size, 1, a.steps, 0)):
        chosen = [groups[i] for i in rows]
        prompts = [g.prompt_ids for g in chosen]
        marks = [clock()]
        with AUTOCAST:
            samples = common.sample(
                model, prompts, a.group_size, a.max_new_tokens, encoder.stops, seed=step)
        marks.append(clock())
        with torch.no_grad(), AUTOCAST:
            bare_sampling(prompts, max(len(s.ids) for s in samples))
        marks.append(clock())

        # As the script: groups with their samples, numbered.
        pieces = []
        for k, s in enumerate(samples):
            if k % a.group_size == 0:
                pieces.append(replace(chosen[k // a.group_size], completion_ids=[], index=[]))
            pieces[-1].completion_ids.append(s.ids)
            pieces[-1].index.append(k)
        lengths = torch.tensor([len(s.ids) for s in samples])
        ones = torch.ones(int(lengths.sum()))
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        micros = common.micro_batches(pieces, a.micro_batch_tokens)

        marks.append(clock())
        optimizer.zero_grad(set_to_none=True)
        ref = script.log_probs(reference, [pieces], lengths, args, True, AUTOCAST)
        tokens = script.Tokens(ones, ones, math.nan * ones, ref, owner, lengths)
        for micro in micros:
            with AUTOCAST:
                logp = common.token_logps(model, common.lay_out(model, micro, True))
            script.micro_loss(tokens.of(micro, logp), args)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        marks.append(clock())
        optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            batch = common.lay_out(model, micro, True).to(DEVICE)
            with torch.no_grad(), AUTOCAST:
                log_prob(reference, batch)
            with AUTOCAST:
                loss = log_prob(model, batch)
            loss.backward()
        marks.append(clock())
        times.append([later - earlier for earlier, later in zip(marks, marks[1:])])

    sampling, bare_sample, _, update, bare_update = (sum(column) for column in zip(*times[1:]))
    bare = bare_sample + bare_update
    return {
        "seconds_per_step": bare / (len(times) - 1),
        "speed": bare / (sampling + update),
        "split": {"sampling": bare_sample / sampling, "update": bare_update / update}}


# --- main -----------------------------------------------------------------------------------------

def measure(command):
    """The JSON line that a command ends with."""
    silent = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=silent)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(a):
    ours = measure([sys.executable, *sys.argv, "--part", "train"])
    print(f"{a.what}: {ours['seconds_per_step']:.2f} s a step of {a.batch_size} groups, "
          f"{ours['tokens_per_second']:,} tokens/s, peak {ours['peak_mb_above_model']:,} MB above "
          "the model")
    if a.what == "grpo":
        split = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in ours["split"].items())
        print(f"split: {split}; sampling {ours['sample_tokens_per_second']:,} tokens/s, update "
              f"{ours['tokens_per_second']:,} tokens/s")

    bare = measure([sys.executable, *sys.argv, "--part", "floor"])
    line = f"floor: {bare['seconds_per_step']:.2f} s a step; step by step in one process, ours runs"
    line += f" at {100 * bare['speed']:.0f} % of the floor's speed"
    if a.what == "grpo":
        split = ", ".join(f"{name} {100 * speed:.0f} %" for name, speed in bare["split"].items())
        line += f" ({split})"
    print(line)
    if "overhead" in bare:
        print(f"padding and repeated prompts: {100 * bare['overhead']:.0f} % on top of the tokens "
              "with each prompt counted once (the floor computes them too)")

    if a.against:
        peer = measure(shlex.split(a.against))
        faster = peer["seconds_per_step"] / ours["seconds_per_step"]
        smaller = peer["peak_mb_above_model"] / ours["peak_mb_above_model"]
        print(f"against: {peer['seconds_per_step']:.2f} s a step, peak "
              f"{peer['peak_mb_above_model']:,} MB: ours is {faster:.1f}× faster and takes "
              f"{smaller:.1f}× less memory")
        theirs = [round(line.get("loss", 0), 5) for line in peer.get("log", [])]
        print(f"losses, ours: {ours['losses']}\nlosses, theirs: {theirs}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["dpo", "rm", "grpo", "joy-prompts"])
    p.add_argument("--model", default=f"{TOY}/model")
    p.add_argument("--data", help="default: the toy's")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-tokens", type=int, default=8192)
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--flags", default="", help='more flags of the script, "--compile" for example')
    p.add_argument("--against", help="command of another trainer on the same work")
    p.add_argument("--part", choices=["train", "floor"], help=argparse.SUPPRESS)
    a = p.parse_args()
    a.data = a.data or f"{TOY}/{'prompts' if a.what == 'grpo' else 'pairs'}.jsonl"
    if a.what == "joy-prompts":
        joy_prompts()
    elif a.part == "train":
        print(json.dumps(train(a)))
    elif a.part == "floor":
        print(json.dumps(floor_grpo(a) if a.what == "grpo" else floor(a)))
    else:
        report(a)


if __name__ == "__main__":
    main()

"""How fast, how much memory, and how far from the floor. Prints ratios; asserts nothing.

    python tests/bench.py dpo                            # on the toy; or --model DIR --data FILE
    python tests/bench.py rm   --model DIR --data pairs.jsonl [--against "COMMAND"]
    python tests/bench.py grpo --model DIR --data prompts.jsonl [--group-size 8] …
    python tests/bench.py joy-prompts > prompts.jsonl    # 64 beginnings of stories, for joy() below
    python tests/bench.py list-prompts > prompts.jsonl   # 200 questions to a chat model, for bullets()

First what packing saves in the first step of the data: tokens with each prompt once, tokens that
are computed, tokens of one padded batch. Then --steps steps by the script's own main(), in a
process of its own: seconds of the whole run, from reading the data to the saved model; seconds a
step (median, the first step is warm-up), with its share of the reference's log-probs, which dpo
measures once, before training; tokens a second; peak memory above the loaded model.

The floor on the same steps: a bare forward of the reference (not for rm), forward and backward over
the tokens that must be computed (each prompt once, the head at completion positions only, for rm at
the last), all logits kept, without recomputation, optimizer or logging; for grpo also one call of
the model with its cache for every token of the longest completion. Over 100 % is possible: kept
logits cost time too. grpo's reward counts happy words, which costs nothing.

--against runs another trainer's command and reads the JSON line that it ends with:
seconds_whole_run, seconds_per_step and peak_mb_above_model. Whole runs count the reference wherever
it is measured.
"""
import argparse
import importlib
import json
import os
import re
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
import train_rm  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GIVES = {"rm": "pair", "dpo": "pair", "grpo": "prompt"}
AUTOCAST = torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


# --- data and reward of the story model -----------------------------------------------------------

def joy(completions, **_):
    """How often a story says happy, smile or love: a reward that is easy to game."""
    return [float(sum(text.count(word) for word in ("happy", "smile", "love")))
            for text in completions]


def words_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def three_bullets(completions, **_):
    """1 for exactly three lines, each a bullet point, in under 60 words, else 0."""
    return [float(score == 1.5) for score in bullets(completions)]


def bullets(completions, **_):
    """0 to 1 for how near an answer is to exactly three bullet points, and 0.5 for under 60 words."""
    scores = []
    for text in map(words_of, completions):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        points = [bool(re.match(r"([-*•]|\d+[.)]) ", line)) for line in lines]
        near = max(0.0, 1 - (abs(sum(points) - 3) + points.count(False)) / 3)
        scores.append(near + 0.5 * (len(text.split()) < 60))
    return scores


TASKS = """cook rice|learn to swim|sleep better|save money|grow tomatoes|train a puppy|learn the guitar
write a letter|clean a window|stay healthy|read faster|plan a trip|make new friends|bake bread
fix a bicycle|speak in public|learn a language|remember names|reduce stress|paint a wall
make good coffee|find a job|stop biting nails|care for a cat|run a marathon|start a garden
take better photos|wash wool|improve my memory|be on time|write a poem|choose a phone
keep plants alive|learn to dance|host a dinner|study for an exam|save water|get up early
teach a child to read|play chess better""".replace("\n", "|").split("|")
QUESTIONS = [
    "How can I {}?", "Give me advice: I want to {}.", "What do I need to know to {}?",
    "My friend would like to {}. What should they do?", "What mistakes should I avoid when I {}?"]


def list_prompts():
    """200 questions as chat prompts, one a line; the last 50 are about tasks of their own."""
    for task in TASKS:
        for question in QUESTIONS:
            text = question.format(task) + " Answer with three bullet points."
            print(json.dumps({"prompt": [{"role": "user", "content": text}]}))


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


def flags_of(a, out):
    """The flags of the script for what is measured here."""
    flags = (
        f"--model {a.model} --dataset {a.data} --output-dir {out} --batch-size {a.batch_size} "
        f"--max-steps {a.steps} --learning-rate 1e-6 --warmup-steps 0 --lr-schedule constant "
        f"--eval-fraction 0 --max-length 4096 --micro-batch-tokens {a.micro_batch_tokens} ")
    if a.what == "grpo":
        flags += f"--reward {__file__}:joy --group-size {a.group_size} "
        flags += f"--max-new-tokens {a.max_new_tokens} "
    return (flags + a.flags).split()


def train(a):
    """The script itself, watched from outside: when it says a step is done, and when it has loaded
    its model and measured its reference."""
    script = importlib.import_module(f"train_{a.what}")
    ticks = []                                               # the loop's beginning, and each step
    peaks = []
    loaded = []
    reference = []                                           # seconds of its log-probs

    def watch(owner, name, note):
        """note(seconds, result) whenever a function of the script or of common has returned."""
        def watched(*args, real=getattr(owner, name), **options):
            began = clock()
            result = real(*args, **options)
            note(clock() - began, result)
            return result

        setattr(owner, name, watched)

    def step_done(*_):
        ticks.append(clock())
        peaks.append(peak_mb())                              # of training, not of saving

    def model_loaded(_, model):
        for p in model.parameters():
            p.sum().item()                                   # a checkpoint is mapped, not read
        loaded.append(peak_mb())

    watch(common, "end_step", step_done)
    watch(common, "load_weights", model_loaded)
    if a.what == "dpo":
        watch(script, "measure_reference", lambda seconds, _: reference.append(seconds))
    with tempfile.TemporaryDirectory() as out:
        began = clock()
        script.main(flags_of(a, out))
        whole = clock() - began
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").open()]

    def median(name):
        return statistics.median(line[name] for line in lines[1:])

    share = sum(reference) / a.steps
    result = {
        "seconds_whole_run": whole,
        "seconds_per_step": statistics.median(y - x for x, y in zip(ticks, ticks[1:])) + share,
        "reference_share": share,
        "peak_mb_above_model": round(peaks[-1] - loaded[0]),
        "tokens_per_second": round(median("tokens_per_second")),
        "losses": [round(line["loss"], 5) for line in lines]}
    if a.what == "grpo":
        sample = median("seconds/sample")                    # the update: with the reference
        result["split"] = {"sample": sample, "update": result["seconds_per_step"] - sample}
    return result


def floor(a):
    """What any trainer has to compute: seconds of a step, and the sizes of the first one."""
    script = importlib.import_module(f"train_{a.what}")
    args = script.parse_args(flags_of(a, "none"))
    encoder = common.load_encoder(a.model, args, to_last_token=a.what == "rm")
    usable = [name for name, row in common.FORMATS.items() if row.gives == GIVES[a.what]]
    groups = common.read_groups(a.data, "train", usable, args)[0]
    groups = common.tokenise(
        groups, encoder, 4096, reserve=a.max_new_tokens if a.what == "grpo" else 1)
    if a.what == "rm":
        model = train_rm.load_reward_model(a.model, encoder, DEVICE, new_head=True)
    else:
        model = common.load_model(a.model, encoder, DEVICE)

    def sampling(prompts, tokens):
        """Every prompt as long as the longest: a plain loop has nothing better."""
        width = max(map(len, prompts))
        ids = torch.tensor([(prompt * 4096)[:width] for prompt in prompts], device=DEVICE)
        cache = model(input_ids=ids, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(a.group_size)
        one = ids[:, :1].repeat_interleave(a.group_size, 0)
        for _ in range(tokens - 1):
            model(input_ids=one, past_key_values=cache, logits_to_keep=1)

    def update(batch):
        """The loss, with all logits at once; a head of scores is read at the last tokens."""
        hidden = common.hidden_states(model, batch)
        if a.what == "rm":
            return F.softplus(model.score(hidden[batch.last]).view(-1, 2).diff()).sum()
        return F.cross_entropy(common.head_logits(model, hidden[batch.read]), batch.target)

    times = []                                               # (sampling, update) of each step
    for step, places in enumerate(common.make_plan(len(groups), args)):
        chosen = [groups[i] for i in places]
        began = between = clock()
        if a.what == "grpo":
            prompts = [g.prompt_ids for g in chosen]
            with AUTOCAST:
                samples = common.sample(
                    model, prompts, a.group_size, a.max_new_tokens, encoder.stops, seed=step)
            ids = [s.ids for s in samples]
            chosen = [replace(g, completion_ids=ids[k * a.group_size:(k + 1) * a.group_size])
                      for k, g in enumerate(chosen)]
            began = clock()
            with torch.no_grad(), AUTOCAST:
                sampling(prompts, max(map(len, ids)))
            between = clock()

        batches = [common.lay_out(model, micro, True)
                   for micro in common.micro_batches(chosen, a.micro_batch_tokens)]
        model.zero_grad(set_to_none=True)
        for batch in batches:
            if a.what != "rm":                               # the reference
                with torch.no_grad(), AUTOCAST:
                    update(batch)
            with AUTOCAST:
                loss = update(batch)
            loss.backward()
        times.append((between - began, clock() - between))

        if step == 0:
            each = [len(g.prompt_ids) + len(ids) for g in chosen for ids in g.completion_ids]
            sizes = {"tokens": sum(g.tokens() for g in chosen), "padded": len(each) * max(each),
                     "computed": sum(batch.input_ids.numel() for batch in batches)}
    sample, rest = (statistics.median(column) for column in zip(*times[1:]))     # without warm-up
    return sizes | {"seconds_per_step": sample + rest, "split": {"sample": sample, "update": rest}}


# --- main -----------------------------------------------------------------------------------------

def measure(command):
    """The JSON line that a command ends with."""
    silent = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=silent)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(a):
    bare = measure([sys.executable, *sys.argv, "--part", "floor"])
    print(f"first step: {bare['tokens']:,} tokens with each prompt once; computed "
          f"{bare['computed']:,}; one padded batch {bare['padded']:,} "
          f"({bare['padded'] / bare['computed']:.1f}×)")
    ours = measure([sys.executable, *sys.argv, "--part", "train"])
    print(f"{a.what}: whole run {ours['seconds_whole_run']:.1f} s; a step of {a.batch_size} groups "
          f"{ours['seconds_per_step']:.3f} s ({ours['reference_share']:.3f} s of it for the "
          f"reference before training), {ours['tokens_per_second']:,} tokens/s, peak "
          f"{ours['peak_mb_above_model']:,} MB above the model")
    line = f"floor: {bare['seconds_per_step']:.3f} s a step"
    for name, seconds in ours.get("split", {}).items():
        line += f"; {name} {bare['split'][name]:.3f} s, ours {seconds:.3f} s"
    speed = bare["seconds_per_step"] / ours["seconds_per_step"]
    print(f"{line}; ours runs at {100 * speed:.0f} % of the floor's speed")

    if a.against:
        peer = measure(shlex.split(a.against))
        names = ("seconds_whole_run", "seconds_per_step", "peak_mb_above_model")
        for name in filter(peer.get, names):
            print(f"against, {name}: ours {ours[name]:,.2f}, theirs {peer[name]:,.2f}: "
                  f"{peer[name] / ours[name]:.1f}× less")
        theirs = [round(line.get("loss", 0), 5) for line in peer.get("log", [])]
        print(f"losses, ours: {ours['losses']}\nlosses, theirs: {theirs}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("what", choices=["dpo", "rm", "grpo", "joy-prompts", "list-prompts"])
    p.add_argument("--model", default=f"{TOY}/model")
    p.add_argument("--data", help="default: the toy's")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-tokens", type=int, default=8192)
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--flags", default="", help="more flags of the script")
    p.add_argument("--against", help="command of another trainer on the same work")
    p.add_argument("--part", choices=["train", "floor"], help=argparse.SUPPRESS)
    a = p.parse_args()
    a.data = a.data or f"{TOY}/{'prompts' if a.what == 'grpo' else 'pairs'}.jsonl"
    if a.what == "joy-prompts":
        joy_prompts()
    elif a.what == "list-prompts":
        list_prompts()
    elif a.part == "train":
        print(json.dumps(train(a)))
    elif a.part == "floor":
        print(json.dumps(floor(a)))
    else:
        report(a)


if __name__ == "__main__":
    main()

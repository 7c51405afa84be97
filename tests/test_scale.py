"""Several processes, gradient checkpointing, LoRA, large data: the same numbers as one plain process.

The runs of two processes share one torchrun, which runs this very file (see the end): starting
takes longer than training the toy.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common
import score
import train_dpo
import train_grpo
import train_rm

TOY = ROOT / "tests" / "toy"
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="LoRA needs peft")
MAIN = {"dpo": train_dpo.main, "rm": train_rm.main, "grpo": train_grpo.main}

FEW = "--limit 80 --batch-size 8 --max-steps 2 --micro-batch-tokens 60 --eval-fraction 0.1"
PAIRS = f"{FEW} --learning-rate 1e-4 --save-every 1"
DPO = f"{PAIRS} --eval-samples 4"
GRPO = f"{FEW} --learning-rate 1e-4 --eval-samples 4 --max-new-tokens 4 --group-size 4 --eval-k 2"
LORA = " --lora-rank 4" if find_spec("peft") else ""
CASES = {                        # name: flags. Of "wide" the layout is padded
    "dpo": f"{DPO} --model UNTIED --gradient-checkpointing",
    "dpo-lora": f"{DPO} --batch-size 1 --gradient-checkpointing" + LORA,     # a process is idle
    "rm": PAIRS,
    "rm-wide": f"{PAIRS} --center-coef 0.1" + LORA,
    "grpo": f"{GRPO} --beta 0.1 --kl reward --updates-per-batch 2 --minibatches 2",
    "grpo-lora": f"{GRPO} --dynamic-sampling" + LORA,
}


def run_case(name, flags, base):
    """One case, as this process or as one of two → the folder of its run."""
    out = base / str(common.world()) / name
    packs = common.can_pack
    if "wide" in name:
        common.can_pack = lambda *_: False
    try:
        flags = flags.replace("UNTIED", str(base / "untied")).split()
        MAIN[name.split("-")[0]]([*flags, "--output-dir", str(out)])
    finally:
        common.can_pack = packs
    return out


def resume_case(out, to):
    """Goes on with a copy of a run of case "rm" from the checkpoint before its last."""
    if common.rank() == 0:
        shutil.copytree(out, to)
        (to / "checkpoint" / "step-2.safetensors").unlink()
    common.gather(None)                                      # the others wait for the copy
    train_rm.main([*CASES["rm"].split(), "--output-dir", str(to), "--resume"])


def score_case(base):
    """score.py: a reward model scores what the toy's policy samples."""
    flags = f"--policy {TOY}/model --samples 2 --max-new-tokens 4 --limit 12 --reward-model {base}/1/rm"
    score.main([*flags.split(), "--output", str(base / str(common.world()) / "scored.jsonl")])


def torchrun(processes, *command):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", *map(str, command)]
    return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{number of processes: folder of all cases}, and what the first of two processes printed."""
    base = tmp_path_factory.mktemp("scale")
    untied = AutoModelForCausalLM.from_pretrained(TOY / "model")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 1.1)
    untied.save_pretrained(base / "untied")
    common.load_encoder(TOY / "model").tokenizer.save_pretrained(base / "untied")

    run_case("rm", CASES["rm"], base)
    two = torchrun(2, __file__, base)
    for name, flags in CASES.items():
        if name != "rm":
            run_case(name, flags, base)
    score_case(base)
    output, errors = two.communicate(timeout=400)
    assert two.returncode == 0, errors[-3000:]
    return {1: base / "1", 2: base / "2", "output": output}


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(a, b, tolerance=1e-5):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert set(x) == set(y)
        for name in x:
            if "second" not in name:                         # times and tokens per second
                assert x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_numbers_of_one(runs, name):
    assert_same_numbers(metrics(runs[1] / name), metrics(runs[2] / name))
    one = load_file(runs[1] / name / "model.safetensors")
    two = load_file(runs[2] / name / "model.safetensors")
    assert set(one) == set(two)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=3e-4)


def test_score_gives_the_same_rows_with_two_processes(runs):
    one, two = (common.read_lines(runs[i] / "scored.jsonl") for i in (1, 2))
    assert len(one) == len(two) == 24
    for a, b in zip(one, two):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a | {"score": 0} == b | {"score": 0}


def test_only_the_first_process_prints(runs):
    assert runs["output"].count("step 0: eval loss") == sum(not n.startswith("grpo") for n in CASES)


def test_what_two_processes_save_is_a_plain_model(runs):
    config = json.loads((runs[2] / "rm" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    model, info = AutoModelForSequenceClassification.from_pretrained(
        runs[2] / "rm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_checkpoint_of_one_process_goes_on_with_two(runs):
    assert_same_numbers(metrics(runs[2] / "resumed"), metrics(runs[1] / "rm"))


def test_a_checkpoint_of_two_processes_goes_on_with_one(runs, tmp_path):
    resume_case(runs[2] / "rm", tmp_path / "resumed")
    assert_same_numbers(metrics(tmp_path / "resumed"), metrics(runs[1] / "rm"))


def test_a_killed_process_ends_the_run_which_goes_on_with_one(tmp_path):
    flags = f"{PAIRS} --eval-samples 0 --save-every 1".replace("--max-steps 2", "--max-steps 400")
    run = torchrun(2, "train_dpo.py", *flags.split(), "--output-dir", tmp_path)
    while not list(tmp_path.glob("checkpoint/step-3.safetensors")):
        assert run.poll() is None, run.stderr.read()[-2000:]
        time.sleep(0.1)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    assert run.wait(60) != 0
    done = common.newest_checkpoint(tmp_path)[0]
    flags = flags.replace("--max-steps 400", f"--max-steps {done + 1}")
    train_dpo.main([*flags.split(), "--output-dir", str(tmp_path), "--resume"])
    assert [line["step"] for line in metrics(tmp_path) if "loss" in line] == list(range(1, done + 2))


# --- gradient checkpointing -----------------------------------------------------------------------

def toy_groups(count=6):
    encoder = common.load_encoder(TOY / "model")
    groups, account = common.read_groups(f"{TOY}/pairs.jsonl", ["pair"], limit=count)
    groups = common.tokenise(groups, account, encoder, 512)
    common.number_completions(groups)
    return encoder, groups


def test_gradient_checkpointing_keeps_little_and_gives_the_same_gradient(capsys):
    encoder, groups = toy_groups()
    kept = []
    gradients = []
    for flags in ([], ["--gradient-checkpointing"]):
        args = train_dpo.parse_args(flags)
        model = common.load_model(TOY / "model", encoder, torch.device("cpu"))
        common.wrap_layers(model, args)
        kept.append(common.kept_bytes(model, groups, True, args))
        common.completion_logps(model, common.pack(groups)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.2 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("more", ["", " --gradient-checkpointing"])
def test_compiled_layers_are_one_program_and_give_the_same_gradient(more, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("aot_eager")         # traced as for a GPU, no C++ compiler
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compiler(f, backend=counter, **more))
    encoder, groups = toy_groups(40)
    models = []
    for flags in (more, "--compile" + more):
        models.append(common.load_model(TOY / "model", encoder, torch.device("cpu")))
        common.wrap_layers(models[-1], train_dpo.parse_args(flags.split()))
    for some in (groups[:3], groups[3:10], groups[10:]):     # three shapes
        for model in models:
            model.zero_grad()
            common.completion_logps(model, common.pack(some)).sum().backward()
        for p, q in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    programs = counter.frame_count
    assert programs <= 3                                     # not one for each shape and layer
    prompts = [g.prompt_ids for g in groups[:4]]
    plain, fast = (common.sample(model, prompts, 2, 6, encoder.stops) for model in models)
    assert [s.ids for s in plain] == [s.ids for s in fast] and counter.frame_count == programs


def test_memory_needed_counts_what_is_trained_and_what_is_kept():
    encoder, groups = toy_groups()
    args = train_dpo.parse_args(["--micro-batch-tokens", "60"])
    model = common.load_model(TOY / "model", encoder, torch.device("cpu"))
    weights = sum(p.numel() for p in model.parameters())
    fixed, activations, tokens = common.memory_needed(model, groups, True, args)
    assert fixed == 16 * weights and 40 < tokens <= 60
    model.requires_grad_(False)
    assert common.memory_needed(model, groups, True, args)[0] == 4 * weights


# --- LoRA -----------------------------------------------------------------------------------------

@needs_peft
def test_lora_saves_a_plain_checkpoint_and_the_adapter_beside_it(runs):
    from peft import PeftModel
    out = runs[2] / "dpo-lora"
    encoder, groups = toy_groups()
    batch = common.pack(groups)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(TOY / "model")
    with torch.no_grad():
        merged = common.completion_logps(model, batch)
        start = common.completion_logps(base, batch)
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval().get_base_model()
        beside = common.completion_logps(adapted, batch)
        with common.adapter_off(adapted):
            off = common.completion_logps(adapted, batch)
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
    assert torch.equal(off, start) and (merged - start).abs().max() > 1e-3


@needs_peft
def test_lora_trains_only_the_adapter_and_a_reward_head():
    encoder, groups = toy_groups()
    args = train_rm.parse_args(["--lora-rank", "4"])
    model = common.load_reward_model(TOY / "model", encoder, torch.device("cpu"), new_head=True)
    before = common.reward_scores(model, common.pack(groups))
    common.add_lora(model, args)
    assert torch.equal(common.reward_scores(model, common.pack(groups)), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name.startswith("score.") for name in trained)


def test_lora_without_peft_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_dpo.parse_args(["--lora-rank", "4"])
    assert "pip install peft" in capsys.readouterr().err


# --- sampling -------------------------------------------------------------------------------------

def tiny(kind):
    options = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "gpt2":
        options = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "mistral":
        options["sliding_window"] = 6
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)                                        # or all tokens were about as likely
    return model


def plain_sample(model, prompt, u, stops):
    """One completion, without a cache and without a batch."""
    ids = []
    for number in u:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        cdf = logits.softmax(-1).double().cumsum(0)
        ids.append(int(torch.searchsorted(cdf, number * cdf[-1], right=True)))
        if ids[-1] in stops:
            break
    return ids


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("coarse", [False, True])
def test_a_batch_exact_or_coarse_gives_what_each_prompt_gives_alone(kind, coarse):
    model = tiny(kind)
    prompts = [[5, 6, 7], [9] * 8, [11, 12, 13, 14, 15]]
    stops = list(range(1, 30))                               # rows end all the time
    samples = common.sample(model, prompts, 2, 20, stops, coarse=coarse, seed=1)
    numbers = common.uniforms(prompts, 2, 20, 1).flatten(0, 1)
    assert len({len(s.ids) for s in samples}) > 2
    for i, s in enumerate(samples):
        assert s.ids == plain_sample(model, prompts[i // 2], numbers[i], stops)
        assert s.ended == (s.ids[-1] in stops) and len(s.logps) == len(s.ids)


@torch.no_grad()
def test_a_coarse_batch_has_few_shapes_at_fixed_addresses():
    model = tiny("llama")
    seen = set()
    addresses = set()

    class Note(common.Replay):
        def __call__(self, key, f):
            seen.add(key)
            return super().__call__(key, f)

    decoder = common.Decoder(model, [[5, 6, 7], [8, 9, 10, 11]], 4, 300, coarse=True)
    decoder.replay = Note(False)
    token = torch.zeros(8, dtype=torch.long)
    for t in range(280):
        decoder.step(token)
        addresses.add(decoder.rooms[0].keys.data_ptr())
        if t == 100:
            decoder.keep(torch.tensor([1, 3, 4, 6]))
            token = token[:4]
    assert seen == {(8, 256), (4, 256), (4, 512)} and len(addresses) == 1


class Recorded(common.Replay):
    """Replay with its recording emulated on a CPU: the operators of the second call are recorded
    on the very tensors that they touched, and repeated by all others, which see no Python."""

    def __init__(self):
        super().__init__(False)
        self.replays = 0

    def __call__(self, key, f):
        if key not in self.recorded:
            self.recorded[key] = None
            return f()
        if self.recorded[key] is None:
            self.recorded[key] = make_fx(f)()
        else:
            self.replays += 1
        return self.recorded[key]()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_recorded_step_repeats_on_the_same_tensors_what_the_model_does(kind, monkeypatch):
    model = tiny(kind)
    prompts = [[5, 6, 7], [9] * 8, [11, 12, 13, 14, 15]]
    stops = [1, 2]
    plain = common.sample(model, prompts, 4, 300, stops, coarse=True, seed=1)

    recorder = Recorded()
    monkeypatch.setattr(common, "Replay", lambda on: recorder)
    again = common.sample(model, prompts, 4, 300, stops, coarse=True, seed=1)
    assert [s.ids for s in again] == [s.ids for s in plain]
    assert recorder.replays > 100 and len(recorder.recorded) > 2


def test_two_levels_of_draw_give_the_token_of_one_long_sum():
    torch.manual_seed(0)
    for size in (3, 128, 129, 5000):
        probs = (4 * torch.randn(200, size)).softmax(-1)
        probs[:, size // 2:] *= (torch.arange(200) % 2)[:, None]         # half of them end in zeros
        u = torch.rand(200, dtype=torch.float64)
        cdf = probs.double().cumsum(1)
        want = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
        got = common.draw(probs, u)
        assert (got != want).sum() <= 1 and (probs.gather(1, got[:, None]) > 0).all()
    edge = torch.zeros(2, 300)
    edge[:, 150] = 1
    assert common.draw(edge, torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)).tolist() == [150] * 2


# --- large data -----------------------------------------------------------------------------------

def test_only_rows_that_a_step_uses_get_reference_log_probs(measured, tmp_path):
    flags = "--max-steps 2 --batch-size 8 --eval-limit 10 --eval-samples 0 --output-dir"
    train_dpo.main([*flags.split(), str(tmp_path)])
    assert len(measured[0][1]) == 2 * 8 + 10                 # of 2,000 rows
    assert metrics(tmp_path)[0]["eval/n"] == 10


def test_the_plan_knows_which_rows_it_uses():
    plan = common.Plan(10, 3, 1, 2, seed=0)
    assert plan.used() == sorted(plan[0] + plan[1])
    assert common.Plan(10, 3, 2, 0, seed=0).used() == list(range(10))
    assert len(common.Plan(10 ** 6, 8, 1, 10 ** 6, 0).used()) == 10 ** 6


def test_tokenising_many_rows_in_one_go_gives_the_same_ids():
    encoder, groups = toy_groups(40)
    for group in groups:
        alone = encoder(replace(group))
        assert (alone.prompt_ids, alone.completion_ids) == (group.prompt_ids, group.completion_ids)


# --- what torchrun runs ---------------------------------------------------------------------------

def run_all(base):
    common.join_processes("cpu")
    for name, flags in CASES.items():
        run_case(name, flags, base)
    resume_case(base / "1" / "rm", base / "2" / "resumed")
    score_case(base)

    # Weights are shards, and stay so after a forward without a gradient.
    encoder, groups = toy_groups()
    model = common.load_model(TOY / "model", encoder, torch.device("cpu"))
    want = common.completion_logps(model, common.pack(groups)).detach()
    common.shard(model, train_dpo.parse_args([]))
    with torch.no_grad():
        got = common.completion_logps(model, common.pack(groups))
    assert all(isinstance(p, common.DTensor) for p in model.parameters())
    assert (got - want).abs().max() < 1e-4


if __name__ == "__main__":
    common.run(lambda: run_all(Path(sys.argv[1])))

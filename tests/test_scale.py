"""Several processes, LoRA, gradient checkpointing, bfloat16: the numbers of one plain process.

All runs of two processes share one torchrun, which runs this very file (see the end): starting
takes longer than training the toy.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common
import score
import train_dpo
import train_grpo
import train_rm

TOY = ROOT / "tests" / "toy"
MAIN = {"dpo": train_dpo.main, "kto": train_dpo.main, "rm": train_rm.main, "grpo": train_grpo.main}
CPU = torch.device("cpu")

FEW = ("--limit 60 --eval-fraction 0.3 --batch-size 8 --max-steps 2 --micro-batch-tokens 60 "
       "--learning-rate 1e-4")
CONSTANT = "--lr-schedule constant --warmup-steps 0"
DPO = f"{FEW} --eval-samples 4"
GRPO = f"{FEW} --eval-samples 4 --max-new-tokens 4 --group-size 4 --eval-k 2"
LORA = "--lora-rank 4" if find_spec("peft") else ""
CASES = {
    "rm": f"{FEW} {CONSTANT} --center-coef 0.1",
    "dpo": f"{DPO} --model UNTIED --gradient-checkpointing",
    "dpo-lora": f"{DPO} --batch-size 1 --gradient-checkpointing {LORA}",         # one is idle
    "kto": f"{DPO} --loss kto",                                                  # padded
    "grpo": f"{GRPO} --beta 0.1 --kl reward --updates-per-batch 2 --minibatches 2",
    "grpo-lora": f"{GRPO} --dynamic-sampling {LORA}",
}


def run_case(name, base, *more, to=None):
    """One case, as this process or as one of two, in the folder base/PROCESSES/NAME."""
    packs = common.can_pack
    if name == "kto":
        common.can_pack = lambda *_: False
    flags = CASES[name].replace("UNTIED", f"{base}/untied").split()
    try:
        MAIN[name.split("-")[0]]([*flags, *more, "--output-dir", str(to or base / name)])
    finally:
        common.can_pack = packs


def score_case(base, to):
    """score.py: a reward model scores what the toy's policy samples."""
    flags = f"--policy {TOY}/model --samples 2 --max-new-tokens 4 --limit 12 --reward {base}/rm"
    score.main([*flags.split(), "--output", str(to / "scored.jsonl")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of one process, of two, what the first of two printed)"""
    base = tmp_path_factory.mktemp("scale")
    untied = AutoModelForCausalLM.from_pretrained(TOY / "model")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 1.1)
    untied.save_pretrained(base / "untied")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(base / "untied")
    run_case("rm", base)
    run_case("rm", base, "--max-steps", "1", to=base / "two" / "resumed")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.Popen(
        [*line, __file__, base], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name in CASES:
        if name != "rm":
            run_case(name, base)
    score_case(base, base)
    output, errors = two.communicate(timeout=300)
    assert (base / "two" / "over").exists(), errors[-3000:]
    assert two.returncode != 0                               # its last case was killed
    return base, base / "two", output


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert set(x) == set(y)
        for name in x:
            if "second" not in name:                         # times and tokens per second
                assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("name", CASES)
def test_d6_b15_two_processes_give_the_numbers_of_one(runs, name):
    if "lora" in name:
        pytest.importorskip("peft")
    assert_same_numbers(metrics(runs[0] / name), metrics(runs[1] / name))
    one, two = [load_file(base / name / "model.safetensors") for base in runs[:2]]
    model = runs[0] / "untied" if name == "dpo" else TOY / "model"
    start = load_file(model / "model.safetensors")
    assert set(one) == set(two)
    apart = moved = 0
    for key in set(one) & set(start):
        apart += (one[key] - two[key]).norm() ** 2
        moved += (one[key] - start[key]).norm() ** 2
    assert apart < 1e-3 * moved                              # Adam makes much of gradients near 0


def test_score_gives_the_same_rows_with_two_processes(runs):
    one, two = [(base / "scored.jsonl").read_text().splitlines() for base in runs[:2]]
    assert len(one) == len(two) == 24
    for a, b in zip(map(json.loads, one), map(json.loads, two)):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert a | {"score": 0} == b | {"score": 0}


def test_d6_only_the_first_process_prints(runs):
    assert runs[2].count("step 0: eval") == len(CASES) + 2   # "short" and "killed"
    assert runs[2].count("saved in") == len(CASES) + 2       # "resumed" and "short"


def test_what_two_processes_save_is_a_plain_model(runs):
    for name, kind in (("rm", AutoModelForSequenceClassification), ("dpo", AutoModelForCausalLM),
                       ("grpo-lora", AutoModelForCausalLM)):
        _, info = kind.from_pretrained(runs[1] / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_d2_a_checkpoint_of_one_process_goes_on_with_two(runs):
    assert_same_numbers(metrics(runs[1] / "resumed"), metrics(runs[0] / "rm"))


def test_d2_a_checkpoint_of_two_processes_goes_on_with_one(runs, tmp_path):
    shutil.copytree(runs[1] / "short", tmp_path / "o")
    run_case("rm", runs[0], "--resume", to=tmp_path / "o")
    assert_same_numbers(metrics(tmp_path / "o"), metrics(runs[0] / "rm"))


def test_d2_a_killed_process_ends_the_run_which_goes_on_with_one(runs, tmp_path):
    shutil.copytree(runs[1] / "killed", tmp_path / "o")
    run_case("rm", runs[0], "--max-steps", "4", "--save-every", "1", "--resume", to=tmp_path / "o")
    lines = metrics(tmp_path / "o")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert_same_numbers(lines[:3], metrics(runs[0] / "rm")[:3])


def test_weights_are_shards_also_after_a_forward_without_a_gradient(runs):
    assert (runs[1] / "over").read_text() == "sharded True, apart 0.0000"


# --- one process ----------------------------------------------------------------------------------

def toy(*flags, limit=6):
    """(args, model, groups) of the toy's pairs."""
    args = train_dpo.parse_args(["--limit", str(limit), *flags])
    encoder = common.load_encoder(args.model, args)
    groups, *_ = common.read_groups(args.dataset, "train", ["pair"], args)
    groups = common.tokenise(groups, encoder, 512)
    return args, common.load_model(args.model, encoder, CPU), groups, encoder


def test_b4_d4_gradient_checkpointing_keeps_little_and_gives_the_same_gradient():
    kept = []
    gradients = []
    for flags in ([], ["--gradient-checkpointing"]):
        args, model, groups, _ = toy(*flags)
        common.prepare_model(model, args)
        weights = {p.data_ptr() for p in model.parameters()}
        bytes_of = {}

        def note(x):
            if x.data_ptr() not in weights:
                bytes_of[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logps = common.completion_logps(model, common.lay_out(model, groups, True))
            kept.append(sum(bytes_of.values()))
        logps.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.3 * kept[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert all(g.abs().max() > 0 for g in gradients[0])


def test_g1_samples_are_the_same_with_gradient_checkpointing():
    found = []
    for flags in ([], ["--gradient-checkpointing"]):
        args, model, groups, encoder = toy(*flags)
        common.prepare_model(model, args)
        prompts = [g.prompt_ids for g in groups]
        found.append(common.sample(model, prompts, 2, 8, encoder.stops, temperature=0))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_b12_b13_the_reference_starts_as_the_policy_in_every_dtype(dtype, tmp_path):
    args, model, groups, encoder = toy("--dtype", dtype)
    _, autocast = common.set_up_device(args)
    reference = common.load_reference(args, encoder, CPU)
    with torch.no_grad(), autocast:
        ours, theirs = [
            common.token_logps(m, common.lay_out(m, groups, True)) for m in (model, reference)]
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32

    small = ["--limit", "60", "--batch-size", "8", "--max-steps", "1", "--eval-samples", "4",
             "--dtype", dtype, "--micro-batch-tokens", "100", "--output-dir"]
    train_grpo.main([*small, str(tmp_path / "grpo"), "--group-size", "4", "--max-new-tokens", "8"])
    first = metrics(tmp_path / "grpo")[1]
    assert first["kl"] == 0 == first["clip_ratio"]
    train_dpo.main([*small, str(tmp_path / "dpo")])
    assert metrics(tmp_path / "dpo")[1]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_only_rows_that_a_step_uses_get_reference_log_probs(measured, tmp_path):
    flags = "--max-steps 2 --batch-size 8 --eval-limit 10 --eval-samples 0 --output-dir"
    train_dpo.main([*flags.split(), str(tmp_path)])
    before = [len(groups) for _, groups in measured]
    assert before[:3] == [8, 8, 10]                          # of 2,000 rows
    assert metrics(tmp_path)[0]["eval/n"] == 10


# --- LoRA -----------------------------------------------------------------------------------------

@torch.no_grad()
def test_d5_lora_saves_a_plain_checkpoint_and_the_adapter_beside_it(runs):
    peft = pytest.importorskip("peft")
    _, base, groups, _ = toy()
    batch = common.lay_out(base, groups, True)
    for out in (base / "dpo-lora" for base in runs[:2]):
        start = common.completion_logps(base, batch)
        merged = AutoModelForCausalLM.from_pretrained(out)
        merged = common.completion_logps(merged, batch)
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
        beside = common.completion_logps(adapted.get_base_model(), batch)
        base = adapted.unload()
        torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)
        assert (merged - start).abs().max() > 1e-3


def test_c4_lora_trains_only_the_adapter_and_a_reward_head():
    pytest.importorskip("peft")
    args, _, groups, encoder = toy("--lora-rank", "4")
    model = train_rm.load_reward_model(args.model, encoder, CPU, new_head=True)
    batch = common.lay_out(model, groups, True)
    before = train_rm.reward_scores(model, batch)
    adapter = common.prepare_model(model, args)
    assert torch.equal(train_rm.reward_scores(model, batch), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name or name.startswith("score.") for name in trained)
    assert "score.weight" in trained and adapter.training is False


def test_lora_without_peft_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    args, model, *_ = toy("--lora-rank", "4")
    with pytest.raises(SystemExit):
        common.prepare_model(model, args)
    assert "pip install peft" in capsys.readouterr().err


# --- what torchrun runs ---------------------------------------------------------------------------

def run_all(base):
    two = base / "two"
    for name in CASES:
        run_case(name, base, to=two / name)
    run_case("rm", base, "--resume", to=two / "resumed")
    run_case("rm", base, "--max-steps", "1", to=two / "short")
    score_case(base, two)

    args, model, groups, _ = toy()
    batch = common.lay_out(model, groups, True)
    want = common.completion_logps(model, batch).detach()
    common.shard(model, "float32")
    with torch.no_grad():
        apart = (common.completion_logps(model, batch) - want).abs().max()
    sharded = all(isinstance(p, DTensor) for p in model.parameters())

    def die(bar, step, steps, words):
        if step == 3:
            common.gather(None)
            if common.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    common.end_step = die
    if common.rank() == 0:
        (two / "over").write_text(f"sharded {sharded}, apart {apart:.4f}")
    run_case("rm", base, "--max-steps", "4", "--save-every", "1", to=two / "killed")


if __name__ == "__main__":
    common.run(lambda: run_all(Path(sys.argv[1])))

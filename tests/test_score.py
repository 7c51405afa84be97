"""score.py: its equations by enumeration, scores that no batch changes, reports, and files that
train_dpo.py reads."""
import functools
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import score
import train_dpo
from common import mean_and_error
from score import parse_args, rejection_sample

TOY = Path(__file__).parent / "toy"
BASE = TOY / "model"
PAIRS = TOY / "pairs.jsonl"
NONE = torch.autocast("cpu", torch.bfloat16, enabled=False)
SAMPLES = ["--policy", BASE, "--limit", 30, "--max-new-tokens", 6]
NUMBER = r"(-?\d+\.\d+)"


def first(completions, **_):                                 # reward functions: this file has some
    return [float(completion.split()[0]) for completion in completions]


async def gaps(completions, n, **_):
    return [[1, None, math.nan][i % 3] for i in n]


def word(completions, **_):
    return ["1"] * len(completions)


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write(file, data):
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    return file


def run(capsys, *flags):
    capsys.readouterr()
    score.main(list(map(str, flags)))
    return capsys.readouterr().out


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        score.main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def scores_of(capsys, folder, *flags):
    """Every score in the --output of these flags."""
    run(capsys, *flags, "--output", folder / "o.jsonl")
    made = rows(folder / "o.jsonl")
    return [row[name] for row in made for name in row if name.startswith("score")]


def text(messages):
    return messages if isinstance(messages, str) else messages[0]["content"]


def save(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def reward_model(folder, seed=0, **config):
    """The toy with a random head: nothing it says is right, and it must always say the same."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.config.update(config)
    return save(model, folder)


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The toy policy with its weights changed a little."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return save(model, tmp_path_factory.mktemp("other"))


# --- equations ------------------------------------------------------------------------------------

plain = functools.cache(AutoModelForCausalLM.from_pretrained)


def log_ratio(policy, prompt_ids, ids):
    """log π/π_ref of a completion, by plain transformers, in float64."""
    losses = []
    for folder in (BASE, policy):
        logits = plain(folder)(torch.tensor([prompt_ids + ids])).logits[0].double()
        logits = logits[len(prompt_ids) - 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
    return len(ids) * (losses[0] - losses[1])


@pytest.mark.parametrize("kind", ["reward model", "implicit"])
def test_eq1_c5_c6_a_score_is_that_of_plain_transformers_whatever_stands_beside_it(kind, rm, other):
    args = parse_args(["--limit", "12"])
    reward = score.load_reward(str(rm), args, "cpu")
    if kind == "implicit":
        models = [common.load_model(path, reward.encoder, "cpu") for path in (other, BASE)]
        encoder = common.load_encoder(other, args)
        reward = score.implicit_reward("implicit", encoder, *models, 0.1)
    groups, _, _ = common.read_groups(str(PAIRS), "train", ["pair"], args)
    for i, g in enumerate(groups):
        g.completions[0] += " so it is" * (4 * i)
    views = list(reward.read(groups).values())

    def measure(views, tokens):
        args.micro_batch_tokens = tokens
        return torch.tensor(reward.measure(views, args, NONE))

    together = measure(views, 10 ** 6)                       # (12, 2)
    assert reward.packed and len(set(together.round(decimals=5).flatten().tolist())) > 12
    alone = torch.cat([measure([g], 1) for g in views])
    backwards = measure(views[::-1], 100).flip(0)
    packed = common.for_all(reward.parts, reward.model, views, args, True, NONE)
    padded = common.for_all(reward.parts, reward.model, views, args, False, NONE)
    reward.packed = False
    for others in (alone, backwards, measure(views, 100)):
        assert torch.allclose(together, others, atol=2e-5)

    tokenizer = AutoTokenizer.from_pretrained(rm)
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    for g, two, *parts in list(zip(views, together, packed, padded))[::3]:
        base = 0.0                                           # what tokens add, they add to it
        for said, ids, value in zip(g.completions, g.completion_ids, two.tolist()):
            want = 0.1 * log_ratio(other, g.prompt_ids, ids)
            if kind == "reward model":
                turns = [*g.prompt, {"role": "assistant", "content": said}]
                whole = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
                want = model(**whole).logits.item()
                base = model(torch.tensor([g.prompt_ids])).logits.item()
            assert value == pytest.approx(want, abs=1e-5)
        for own in parts:                                    # of both completions
            assert sum(own) == pytest.approx(two.sum().item() - 2 * base, abs=1e-4)


@pytest.mark.parametrize("stored", [False, True])
def test_eq2_the_mean_of_a_length_or_the_stored_curve_is_taken_out(stored, tmp_path, capsys):
    """Two lengths, so two bins. The curve that a model stores says something else, and wins."""
    config = {"reward_mean": 5.0, "reward_std": 1.0, "reward_std_calibrated": 1.0,
              "reward_by_length": [[2.0, 1.0], [4.0, 3.0]]}
    model = reward_model(tmp_path / "rm", **(config if stored else {}))
    data = [{"prompt": f"{i}+1", "response": "1" if i % 2 else "123"} for i in range(40)]
    flags = ["--dataset", write(tmp_path / "d.jsonl", data), "--chat", "--reward", model]
    given, calibrated = (
        scores_of(capsys, tmp_path, *flags, *more) for more in ([], ["--calibrate-length"]))
    long, short, middle = map(statistics.mean, (given[::2], given[1::2], given))
    assert abs(long - short) > 0.1
    if stored:
        short, long, middle = 1.0, 3.0, 5.0
    want = [value - (short if i % 2 else long) + middle for i, value in enumerate(given)]
    assert calibrated == pytest.approx(want, abs=1e-6)


def test_eq3_eq4_best_of_n_select_pairs_and_beams_of_a_function(tmp_path, capsys):
    beams = [*SAMPLES, "--reward", f"{TOY}/reward.py:close", "--num-beams", 4, "--beam-chunk", 1]
    flags = [*beams[:-4], "--samples", 4, "--output"]
    said = run(capsys, *flags, tmp_path / "all.jsonl", "--pairs", tmp_path / "p.jsonl")
    every = {}
    for row in rows(tmp_path / "all.jsonl"):
        every.setdefault(text(row["prompt"]), []).append(row["score"])
    cdf = torch.arange(1, 51, dtype=torch.float64) / 50      # 50 different rewards: nearly the bound
    for n in (1, 2, 4):                                      # over all subsets of n of the 4
        best = [max(some) for own in every.values() for some in itertools.combinations(own, n)]
        line = rf"\n +{n} +{NUMBER} +{NUMBER} ±"
        bound, value = map(float, re.search(line, said).groups())
        assert value == pytest.approx(statistics.mean(best), abs=1e-3)
        p = cdf ** n - (cdf - 0.02) ** n
        assert 0 <= bound + 1e-3 - (p * (50 * p).log()).sum().item() < 0.1

    made = rows(tmp_path / "p.jsonl")
    assert len(made) > 10
    for row in made:
        own = every[text(row["prompt"])]
        assert (row["score_chosen"], row["score_rejected"]) == (max(own), min(own))
        assert row["p_chosen"] == pytest.approx(1 / (1 + math.exp(min(own) - max(own))))
    run(capsys, *flags, tmp_path / "s.jsonl", "--select", "best")
    best = {text(row["prompt"]): row["score"] for row in rows(tmp_path / "s.jsonl")}
    assert best == {prompt: max(own) for prompt, own in every.items()}
    found = re.search(rf"score {NUMBER}", run(capsys, *beams))[1]
    assert float(found) > 0.1 + statistics.mean(sum(every.values(), []))


def list_length(completions, completion_ids, **_):
    return [len(one) if isinstance(one, list) else 0.0 for one in completions]


def test_a_reward_gets_one_completion_whatever_columns_the_row_has(tmp_path, capsys):
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [2, 1, 0], "completion_ids": 7}
    flags = ["--dataset", write(tmp_path / "d.jsonl", [row]), "--reward", f"{__file__}:list_length"]
    run(capsys, *flags, "--output", tmp_path / "o.jsonl")
    assert rows(tmp_path / "o.jsonl")[0]["scores"] == [0, 0, 0]


def test_completions_that_score_alike_are_no_pair(tmp_path, capsys):
    flags = [*SAMPLES, "--samples", 2, "--reward", f"{TOY}/reward.py:right", "--pairs"]
    run(capsys, *flags, tmp_path / "p.jsonl")
    made = {(row["score_chosen"], row["score_rejected"]) for row in rows(tmp_path / "p.jsonl")}
    assert made == {(1.0, 0.0)}


def test_eq5_a1_rejection_sampling_goes_to_the_tilted_policy_with_few_samples_less_far():
    ref = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    reward = torch.tensor([0.0, 0.5, 1.0, 1.2], dtype=torch.float64)
    tilted = ref * (reward / 0.5).exp() / (ref * (reward / 0.5).exp()).sum()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(ref, 200_000, replacement=True, generator=generator)
    kept = drawn[rejection_sample(reward[drawn].tolist(), 0.5, generator)]
    assert torch.allclose(torch.bincount(kept) / len(kept), tilted.float(), atol=0.005)
    assert rejection_sample([1.0, 5.0], 1e-3, generator) == [1]          # never none

    highest = torch.maximum(reward[:, None], reward)         # of two samples
    density = ref * (ref * ((reward[:, None] - highest) / 0.5).exp()).sum(1)
    expected = (density @ reward / density.sum()).item()     # E[r | kept]
    assert ref @ reward < expected < tilted @ reward
    twos = reward[drawn[:40_000].view(-1, 2)].tolist()
    kept = [two[i] for two in twos for i in rejection_sample(two, 0.5, generator)]
    assert statistics.mean(kept) == pytest.approx(expected, abs=0.01)


def test_eq6_kl_and_win_rate_of_policies(rm, other, monkeypatch, capsys):
    calls = []

    def sample(policy, prompt_ids, n, *rest, real=common.sample, **options):
        calls.append((prompt_ids, real(policy, prompt_ids, n, *rest, **options)))
        return calls[-1][1]

    monkeypatch.setattr(common, "sample", sample)
    said = run(capsys, "--policy", BASE, other, "--ref-model", BASE, "--samples", 2, "--limit", 20,
               "--max-new-tokens", 3, "--reward", rm)
    zero, (kl, error) = re.findall(rf"KL\(π‖π_ref\) {NUMBER} ± {NUMBER} nats", said)
    prompt_ids, samples = calls[1]
    assert {s.ended for s in samples} == {True, False}       # it counts up to the cut
    prompts = sorted([*range(20)] * 2)
    values = [log_ratio(other, prompt_ids[i], s.ids) for i, s in zip(prompts, samples)]
    assert (float(kl), float(error)) == pytest.approx(mean_and_error(values, prompts), abs=1e-3)
    assert zero[0] == "0.000" and "20 prompts are in all systems" in said
    assert f"of 80 against {BASE}" in said                   # 2 by 2 samples of 20 prompts


# --- the report -----------------------------------------------------------------------------------

def test_c7_c12_ties_count_half_and_errors_are_those_of_prompts(tmp_path, capsys):
    assert [score.win(4.0, x) for x in (3.999, 4.001, 4.000001)] == [1, 0, 0.5]      # float32
    pairs = ["a: 2 x > 1", "a: 2 > 2 y", "b: 1 > 3 x y", "c: 5 x > 0", "c: 5 > 1 x", "d: 4 x > 4 y"]
    pairs = [re.match("(.): (.*) > (.*)", pair).groups() for pair in pairs]
    data = [{"prompt": p, "chosen": w, "rejected": l} for p, w, l in pairs]
    file = write(tmp_path / "d.jsonl", data)
    said = run(capsys, "--reward", f"{__file__}:first", "--dataset", file)
    prompts = [p for p, _, _ in pairs]
    scores = [float(w[0]) for _, w, _ in pairs]
    lengths = [len(w.split()) for _, w, _ in pairs]
    for name, values, unit in [
            ("chosen: score", scores, 1), (r"of 6 pairs, 2 ties; margin", [1, 0, -2, 5, 4, 0], 1),
            ("accuracy", [1, 0.5, 0, 1, 1, 0.5], 100),
            (r"length alone \(.*\)", [1, 0, 0, 1, 0, 0.5], 100)]:      # of more words
        found = re.search(rf"{name} {NUMBER} ± {NUMBER}", said).groups()
        want = [unit * x for x in mean_and_error(values, prompts, unit == 100)]
        assert list(map(float, found)) == pytest.approx(want, abs=6e-4 * unit)
    correlation = f"correlation of score with length {statistics.correlation(scores, lengths):.2f}"
    assert f"completions of length 1.5, {correlation}" in said


def test_two_files_are_compared_on_the_prompts_of_both_which_a_system_column_tells_apart(
        tmp_path, capsys):
    def responses(name, *lines):
        data = [dict(zip(("prompt", "response", "system"), line.split())) for line in lines]
        return write(tmp_path / f"{name}.jsonl", data)

    a = responses("a", "p 1", "q 1", "r 1", "p 2")
    b = responses("b", "q 2", "p 1", "s 1")
    c = responses("c", "p 1 kind", "p 1 rude")
    flags = ["--reward", f"{__file__}:first", "--dataset"]
    said = run(capsys, *flags, a, b, "--output", tmp_path / "o.jsonl")
    assert "2 prompts are in all systems" in said and len(rows(tmp_path / "o.jsonl")) == 7
    middle, error = mean_and_error([1.0, 0.5, 0.0], ["q", "p", "p"], True)
    assert f"wins {100 * middle:.1f} ± {100 * error:.1f} % of 3 against {a}" in said
    assert "2 prompts\n" in run(capsys, *flags, c)
    assert "nothing to compare" in refused(capsys, *flags, a, c)


def test_several_rewards_are_z_scored_with_what_they_stored_then_mean_or_min(tmp_path, capsys):
    stored = {"reward_by_length": [[1.0, 0.0]], "reward_std_calibrated": 0.5}
    a = reward_model(tmp_path / "a", reward_mean=0.0, reward_std=1.0, **stored)
    b = reward_model(tmp_path / "b", seed=3, reward_mean=100.0, reward_std=4.0, **stored)
    right = f"{TOY}/reward.py:right"                         # stores nothing; it gives 1 and 0
    flags = [capsys, tmp_path, "--limit", 10, "--reward"]
    z_b = [(value - 100) / 4 for value in scores_of(*flags, b)]
    z = list(zip(scores_of(*flags, a), z_b, [1.0, -1.0] * 10))
    for name, join in (("mean", statistics.mean), ("min", min)):
        found = scores_of(*flags, a, b, right, "--aggregate", name)
        assert found == pytest.approx(list(map(join, z)), abs=1e-5)
    want = [value / 0.5 for value, *_ in z]                  # a12: the std without length
    assert scores_of(*flags, a, a, "--calibrate-length") == pytest.approx(want, abs=1e-5)
    said = run(capsys, *flags[2:], b)
    assert "100.0 % lie over 3 std from those of its training" in said


def test_implicit_takes_the_beta_of_its_training_and_tokens_is_a_page(other, tmp_path, capsys):
    data = [{"prompt": "<b>&", "response": '1 <script>alert("x")</script>'},
            {"prompt": "2+2", "response": "four"}]
    file = write(tmp_path / "d.jsonl", data)
    flags = [capsys, tmp_path, "--dataset", file, "--ref-model", BASE, "--implicit"]
    default = scores_of(*flags, other, "--tokens", tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text()
    assert "<script>" not in page and "&lt;b&gt;&amp;" in page and "</html>" in page
    sums = []
    for part in page.split('<div class="p">')[1:]:
        values = list(map(float, re.findall(r'title="([+-]\d+\.\d+)"', part)))
        assert ("225 45 35" in part) == (min(values) < 0)
        sums.append(sum(values))
    assert sorted(sums) == pytest.approx(sorted(default), abs=2e-3)

    trained = save(AutoModelForCausalLM.from_pretrained(other), tmp_path / "trained")
    (trained / "args.json").write_text('{"beta": 0.4}')
    for more, factor in (([], 4), (["--beta", 0.2], 2)):
        want = [factor * value for value in default]
        assert scores_of(*flags, trained, *more) == pytest.approx(want, abs=1e-5)


def test_what_stands_beside_and_plots(rm, tmp_path, capsys):
    data = rows(PAIRS)
    flags = ["--reward", rm, "--dataset", write(tmp_path / "test.jsonl", data[:20]),
             "--beside", write(tmp_path / "seen.jsonl", data[20:60]), "--untrained", BASE]
    said = run(capsys, *flags)
    assert "of 20 pairs" in said                             # what stands beside is in no number
    trained, untrained = said.split(f"{rm.name}\n")[1].split("model, a new head\n")
    for picture, count in ((trained, 120), (untrained, 40)):
        bars = " ".join(line[11:] for line in picture.splitlines()[1:])
        assert sum(map(int, re.findall(r" (\d+)(?= |$)", bars))) == count

    curves = ["--dataset", tmp_path / "a", tmp_path / "b"]
    for folder, last in zip(curves[1:], (0.5, 0.6)):
        folder.mkdir()
        data = [{"step": i, "loss": 0.7 if i < 500 else last} for i in range(501)]
        write(folder / "metrics.jsonl", data)
    with open(tmp_path / "b/metrics.jsonl", "a") as file:
        file.write('{"step": 501, "lo')                      # killed while it wrote
    found = re.findall(r"loss +0.7 → (0.\d)   .*/([ab])\n", run(capsys, *curves))
    assert found == [("0.5", "a"), ("0.6", "b")]
    pytest.importorskip("matplotlib")
    for some in (flags, curves):
        run(capsys, *some, "--plot", tmp_path / "p.svg")
        assert 5_000 < (tmp_path / "p.svg").stat().st_size < 100_000


def test_what_has_no_score_or_is_too_long_is_left_out(rm, tmp_path, capsys):
    long = "1 " * 100
    data = [{"prompt": "p", "response": long if i < 2 else str(i), "n": i} for i in range(20)]
    flags = ["--dataset", write(tmp_path / "d.jsonl", data), "--max-length", 50, "--reward"]
    said = run(capsys, *flags, rm)
    assert "scores 18 completions" in said and said.count("--overlong truncate") == 1
    said = run(capsys, *flags, rm, "--overlong", "truncate")
    assert "scores 20 completions" in said and "--overlong truncate" not in said
    run(capsys, *flags, f"{__file__}:gaps", "--output", tmp_path / "o.jsonl")
    assert [row["n"] for row in rows(tmp_path / "o.jsonl")] == list(range(0, 20, 3))
    assert "reward word: '1' for" in refused(capsys, *flags, f"{__file__}:word")


def test_the_implicit_reward_and_the_kl_are_packed_in_bfloat16_as_well(other, capsys):
    said = run(capsys, *SAMPLES, "--implicit", other, "--ref-model", TOY / "model", "--dtype", "bfloat16")
    assert "KL" in said and "is padded" not in said


# --- the policies' answers ------------------------------------------------------------------------

def test_a_prompt_is_answered_in_full(other, tmp_path, capsys):
    question = "What is " + "1 + " * 50 + "1 ?"
    said = run(capsys, "--policy", BASE, other, "--prompt", question, "--temperature", 50, "--chat",
               "--max-new-tokens", 280, "--output", tmp_path / "o.jsonl")
    made = rows(tmp_path / "o.jsonl")
    assert f"▸ {question}" in said and [row["policy"] for row in made] == [str(BASE), str(other)]
    assert any(len(row["response"]) > 200 for row in made)
    for row in made:
        head = f"[{row['policy']}{', cut' * row['cut']}]"
        assert f"{head}\n{row['response'].strip()}\n" in said and "score" not in row


def test_without_any_reward_samples_are_shown_and_keep_chosen_makes_pairs(
        rm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)                              # here is no runs/rm
    data = [row | {"margin": 1.5, "mine": 3} for row in rows(PAIRS)[:30]]
    flags = [*SAMPLES, "--dataset", write(tmp_path / "d.jsonl", data), "--keep-chosen",
             "--pairs", "k.jsonl", "--output", "all.jsonl"]
    said = run(capsys, *flags)
    assert said.count("\n▸ user: ") == 5 and "without --reward they have no score" in said
    given = {text(row["prompt"]): row["chosen"] for row in data}
    sampled = [(text(row["prompt"]), row["response"]) for row in rows("all.jsonl")[:30]]
    assert len(rows("k.jsonl")) > 10
    for row in rows("k.jsonl"):
        assert row["chosen"] == given[text(row["prompt"])] != row["rejected"]
        assert (text(row["prompt"]), row["rejected"]) in sampled
        assert set(row) == {"prompt", "chosen", "rejected", "answer", "mine"}    # 1.5 was the old's
    assert "train_rm.py makes" in refused(capsys)            # nothing to score the pairs with
    assert "train_rm.py makes" in refused(capsys, *SAMPLES, "--tokens", "t.html")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/rm").symlink_to(rm)
    assert "of 40 pairs" in run(capsys, "--limit", 40)


# --- files ----------------------------------------------------------------------------------------

def test_cut_samples_are_marked_and_never_written_to_be_trained_on(rm, tmp_path, capsys):
    """Training would put an end token behind them."""
    flags = [*SAMPLES[:4], "--max-new-tokens", 3, "--samples", 6, "--reward", rm, "--output"]
    file = tmp_path / "all.jsonl"
    run(capsys, *flags, file, "--pairs", tmp_path / "p.jsonl")
    every = rows(file)
    whole = [(row["prompt"], row["response"]) for row in every if not row["cut"]]
    assert 0 < len(whole) < len(every)
    made = rows(tmp_path / "p.jsonl")
    for select in ("best", "rso"):
        run(capsys, *flags, tmp_path / "s.jsonl", "--select", select)
        made += rows(tmp_path / "s.jsonl")
    for row in made:
        for name in {"chosen", "rejected", "response"} & set(row):
            assert (row["prompt"], row[name]) in whole

    run(capsys, "--reward", rm, "--dataset", file, "--output", tmp_path / "2.jsonl")
    for row, again in zip(every, rows(tmp_path / "2.jsonl"), strict=True):
        assert again["score"] == pytest.approx(row["score"], abs=1e-4)
        assert bool(again.get("cut")) == row["cut"]          # they stay what they were
        assert again["policy"] == row["policy"] == str(BASE)
    args = train_dpo.parse_args(["--loss", "sft"])
    groups, _, dropped = common.read_groups(str(file), "train", ["response"], args)
    assert len(train_dpo.prepare(groups, dropped, args)) == len(whole)


def as_format(name, row, i):
    p, good, bad = row["prompt"], row["chosen"], row["rejected"]
    texts = [text(good), text(bad), "7"]
    return {
        "pair": row, "messages": {"messages": p + good},
        "ranked list": {"prompt": p, "completions": texts, "ranks": [1, 3, 2]},
        "unpaired": {"prompt": p, "completion": texts[i % 2], "label": i % 2 == 0},
        "response": {"prompt": text(p), "response": texts[0]}}[name] | {"human": i, "margin": 1.5}


@pytest.mark.parametrize("name, loss", [
    ("pair", "soft"), ("pair", "distill"), ("ranked list", "dpo"), ("unpaired", "kto"),
    ("messages", "sft"), ("response", "sft")])
def test_rows_stay_in_their_format_with_all_columns_and_train_dpo_reads_them(
        name, loss, rm, tmp_path, capsys):
    data = [as_format(name, row, i) for i, row in enumerate(rows(PAIRS)[:24])]
    files = [write(tmp_path / "d.jsonl", data), tmp_path / "o.jsonl"]
    flags = ["--reward", rm, "--dataset", files[0], "--output", files[1]]
    assert ("label 1: score" in run(capsys, *flags)) == (name == "unpaired")
    made = rows(files[1])
    assert [(row["human"], row["margin"]) for row in made] == [(i, 1.5) for i in range(24)]
    temperature = ["--reward-temperature", "2"] if name == "pair" else []
    args = train_dpo.parse_args(["--loss", loss, *temperature])
    before, after = (common.read_groups(str(f), "train", common.FORMATS, args) for f in files)
    assert after[1] == name.replace("messages", "response") and not after[2]
    train_dpo.main(["--dataset", str(files[1]), "--output-dir", f"{tmp_path}/run", "--loss", loss,
                    "--max-steps", "1", "--eval-samples", "0"])
    for b, a, row in zip(before[0], after[0], made):
        assert a.prompt == b.prompt and sorted(a.completions) == sorted(b.completions)
        assert name == "ranked list" or a.scores == b.scores
        assert name != "ranked list" or row["scores_before"] == b.scores == [-1, -3, -2]
    if name != "pair":
        return
    for g, row in zip(train_dpo.prepare(after[0], after[2], args), made, strict=True):
        h = row["score_chosen"] - row["score_rejected"]
        assert row["p_chosen"] == pytest.approx(1 / (1 + math.exp(-h)), abs=1e-6)
        assert g.p_chosen == pytest.approx(1 / (1 + math.exp(-abs(h) / 2)), abs=1e-6)
        assert g.completions[0] == text(row["chosen" if h > 0 else "rejected"])
    run(capsys, *flags, "--confidence", 0.6)
    sure = [row for row in made if not 0.4 < row["p_chosen"] < 0.6]
    assert rows(files[1]) == sure and 0 < len(sure) < len(made)


# --- what cannot work -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", {
    "--implicit x": "--ref-model",
    "--samples 4": "--policy",
    "--policy TOY/model --prompt p --dataset x": "no --dataset",
    "--sample 4": "--sample",                                # no abbreviations
    "--policy a b --samples 2 --pairs x": "--pairs, --select: one --policy",
    "--policy a --pairs x": "--pairs needs two completions",
    "--policy a --samples 2 --num-beams 2": "--num-beams makes one",
    "--policy a --samples 2 --select best": "--select chooses for --output",
    "--policy a --confidence 0.9 --output x": "--confidence",
    "--dataset TOY/pairs.jsonl --output TOY/pairs.jsonl": "it is the --dataset",
    "--plot x.xyz": ".png, .pdf or .svg",
    "--dataset TOY/pairs.jsonl TOY/pairs.jsonl": "one response a row",
    "--policy ./no/model": "no/model",
    "--reward TOY/model": "train_rm.py makes one",
    "--reward TOY/reward.py:right --tokens t.html": "a function has no tokens",
}.items())
def test_bad_flags_and_input_end_in_one_sentence(flags, words, rm, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags.replace("TOY", str(TOY)).split()
    own = [] if {"--implicit", "--reward"} & set(flags) else ["--reward", rm]
    assert words in refused(capsys, *own, *flags)
    assert not list(tmp_path.iterdir())

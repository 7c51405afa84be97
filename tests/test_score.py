"""score.py: pure functions against enumeration, scores that no batch changes, files that train_dpo.py takes, the script."""
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import score
import train_dpo
from score import (
    Scorer, System, align, best_of_n, best_of_n_kl, bootstrap, correlation, histogram, main, read_as, rejection_sample,
    tokens_page, win)

TOY = Path(__file__).parent / "toy"
NONE = torch.autocast("cpu", torch.bfloat16, enabled=False)
PAIRS = [name for name, row in common.FORMATS.items() if row.gives == "pair"]


def reward_model(folder, seed=0, **config):
    """The toy model with a random head: nothing it says is correct, everything it says must stay the same."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    return reward_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The toy policy with a few weights changed: something to compare with."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(TOY / "model")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(folder)
    return folder


def load(path):
    encoder = common.load_encoder(path)
    return Scorer(str(path), encoder, [common.load_reward_model(path, encoder, "cpu")])


def implicit(policy):
    encoder = common.load_encoder(policy)
    models = [common.load_model(folder, encoder, "cpu") for folder in (policy, TOY / "model")]
    return Scorer(str(policy), encoder, models, 0.1)


def measure(scorer, gs, *flags, **options):
    args = score.parse_args(list(map(str, flags)))
    return scorer.measure(gs, args, NONE, progress="", **options)


def pair_groups(encoder, n=12):
    """Pairs of very different lengths."""
    gs, account = common.read_groups(TOY / "pairs.jsonl", PAIRS, limit=n)
    for i, g in enumerate(gs):
        g.completions[0] += " so it is" * (4 * i)
    return common.tokenise(gs, account, encoder, 512)


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def write(file, data):
    file.write_text("".join(json.dumps(r) + "\n" for r in data))
    return file


def run(capsys, *flags):
    main(list(map(str, flags)))
    return capsys.readouterr().out


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def question(row):
    return row["prompt"][0]["content"]


# --- pure functions ------------------------------------------------------------------------------------------------------

def test_eq3_best_of_n_is_the_mean_over_all_subsets():
    scores = [0.3, -1.0, 2.0, 0.5, 0.4, -0.2]
    correct = [1, 0, 0, 1, 1, 0]
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        best = [max(s, key=lambda i: scores[i]) for s in subsets]
        assert best_of_n(scores, n, scores) == pytest.approx(sum(scores[i] for i in best) / len(subsets))
        assert best_of_n(scores, n, correct) == pytest.approx(sum(correct[i] for i in best) / len(subsets))


def test_eq4_kl_of_best_of_n_bounds_the_exact_one():
    assert best_of_n_kl(1) == 0
    p = torch.full((50,), 1 / 50, dtype=torch.float64)       # 50 completions, all rewards different: nearly the bound
    for n in (2, 4, 8):
        cdf = p.cumsum(0)
        best = cdf ** n - (cdf - p) ** n
        exact = (best * (best / p).log()).sum().item()
        assert exact <= best_of_n_kl(n) < exact + 0.1


REF = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0, 1.2], dtype=torch.float64)
TILTED = REF * (REWARD / 0.5).exp() / (REF * (REWARD / 0.5).exp()).sum()                 # (5) at β = 0.5


def test_eq5_rejection_sampling_converges_to_the_tilted_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(REF, 200_000, replacement=True, generator=generator)
    kept = drawn[rejection_sample(REWARD[drawn].tolist(), 0.5, generator)]
    assert torch.allclose(torch.bincount(kept, minlength=4) / len(kept), TILTED.float(), atol=0.005)
    z = (REF * ((REWARD - 1.2) / 0.5).exp()).sum().item()    # acceptance rate: E exp((r − max)/β)
    assert len(kept) / len(drawn) == pytest.approx(z, abs=0.005)
    assert rejection_sample([1.0, 5.0], 1e-3, generator) == [1]          # β → 0 is best-of-N, never nothing


def test_eq5_with_few_samples_is_tilted_less():
    """The density of what is kept from N samples, by enumeration: π_ref e^{r/β} E[e^{−max/β} | r], from π_ref to (5)."""
    means = []
    for n in (1, 2, 4, 6):
        density = torch.zeros(4, dtype=torch.float64)
        for ys in itertools.product(range(4), repeat=n):
            kept = ((REWARD[ys[0]] - REWARD[list(ys)].max()) / 0.5).exp()
            density[ys[0]] += REF[list(ys)].prod() * kept
        means.append((density / density.sum() * REWARD).sum().item())
    assert means[0] == pytest.approx((REF * REWARD).sum().item())
    assert means == sorted(means) and means[-1] < (TILTED * REWARD).sum().item()

    generator = torch.Generator().manual_seed(0)             # and that is what rejection_sample() does
    drawn = torch.multinomial(REF, 2 * 20_000, replacement=True, generator=generator).view(-1, 2)
    kept = [REWARD[ys[i]].item() for ys in drawn for i in rejection_sample(REWARD[ys].tolist(), 0.5, generator)]
    assert statistics.mean(kept) == pytest.approx(means[1], abs=0.01)


def test_bootstrap_covers_the_mean_and_resamples_prompts():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for i in range(100):
        x = torch.randn(60, generator=generator).tolist()
        low, high = bootstrap(x, range(60), seed=i, rounds=400)
        hits += low <= 0 <= high
    assert 86 <= hits <= 100                                 # of nominal 95
    x = torch.randn(40, generator=generator).tolist()
    alone = bootstrap(x, range(40))
    ten = bootstrap([v for v in x for _ in range(10)], [i for i in range(40) for _ in range(10)])
    assert ten == pytest.approx(alone, abs=0.02)             # ten copies of a completion are no new evidence
    assert bootstrap([2.0], [0]) == (2.0, 2.0)


def test_wilson_against_known_values():
    p = common.proportion(torch.arange(100) % 2, torch.arange(100), z=1.96)
    assert p.mean == 0.5 and (p.low, p.high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    p = common.proportion(torch.ones(20), torch.arange(20), z=1.96)
    assert p.low == pytest.approx(0.8389, abs=1e-3) and p.high == pytest.approx(1.0)


def test_ties_count_half_and_1e_3_is_told_apart():
    assert win(1.0, 1.0) == 0.5 and win(2.0, 1.0) == 1.0 and win(1.0, 2.0) == 0.0
    assert win(4.001, 4.0) == 1.0 and win(4.000001, 4.0) == 0.5          # C7; float32 rounding

    def rate(a, b):
        return score.mean([win(x, y) for x in a for y in b])

    assert rate([1.0, 3.0], [1.0, 2.0]) == (0.5 + 0 + 1 + 1) / 4
    a = [0.1, 0.2, 0.2]
    b = [0.2, 0.0]
    assert rate(a, b) + rate(b, a) == pytest.approx(1)


def test_correlation_against_the_standard_library():
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).tolist()
    assert correlation(x, y) == pytest.approx(statistics.correlation(x, y), abs=1e-5)
    assert math.isnan(correlation([1.0, 1.0], [1.0, 2.0])) and math.isnan(correlation([1.0], [1.0]))


def test_alignment_by_prompt_with_duplicates(capsys):
    systems = []
    for prompts in ("abac", "abaca", "xaba"):
        gs = [common.Group(f"row {i}", p, [f"{p}{i}"]) for i, p in enumerate(prompts)]
        systems.append(System("s", "response", gs))
    table = [c for s in systems for c in s.completions]
    met = [c.text for c in align(systems, table)]
    assert met == ["a0", "a0", "a1", "b1", "b1", "b2", "a2", "a2", "a3"]
    assert [c.system for c in align(systems, table)] == 3 * systems


def test_histogram_counts_every_value_once():
    text = histogram({"a": [0.0, 0.0, 1.0], "b": [5.0, 2.0]}, bins=5)
    bars = " ".join(line[11:] for line in text.splitlines()[1:])
    assert sum(map(int, re.findall(r"(?:█| ) ?(\d+)(?= |$)", bars))) == 5
    assert histogram({"a": [1.0, 1.0]})                      # one value only: no division by zero


def test_page_escapes_and_colours():
    shown = [("<script>alert(1)</script>", "chosen", 1.0, ["<b>", '"', "&\n"], [0.5, -0.5, 0.0])]
    page = tokens_page(shown, "a <title>")
    assert "<script" not in page and "<b>" not in page and "&lt;b&gt;" in page
    assert "<title>a &lt;title&gt;</title>" in page
    assert 'class="m"' in page and "-0.5000" in page and "http" not in page


# --- scores: the same, whatever stands beside them ------------------------------------------------------------------------

@pytest.mark.parametrize("make", ["rm", "implicit"])
def test_c6_scores_alone_batched_shuffled_and_beside_long_neighbours(make, rm, other):
    scorer = load(rm) if make == "rm" else implicit(other)
    gs = pair_groups(scorer.encoder)
    together = measure(scorer, gs, "--micro-batch-tokens", 10 ** 6)
    assert scorer.packed and len({round(s, 5) for s in together.tolist()}) > 12
    alone = torch.cat([measure(scorer, [g], "--micro-batch-tokens", 1) for g in gs])
    backwards = measure(scorer, gs[::-1], "--micro-batch-tokens", 100).view(-1, 2).flip(0).flatten()
    assert torch.allclose(together, alone, atol=2e-5) and torch.allclose(together, backwards, atol=2e-5)
    scorer.packed = False
    assert torch.allclose(together, measure(scorer, gs, "--micro-batch-tokens", 100), atol=2e-5)


def test_c5_packed_score_is_transformers_own_on_the_rendered_text(rm):
    scorer = load(rm)
    gs = pair_groups(scorer.encoder, 4)
    ours = iter(measure(scorer, gs).tolist())
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    tokenizer = AutoTokenizer.from_pretrained(rm)
    for g in gs:
        for text in g.completions:
            chat = tokenizer.apply_chat_template(g.prompt + [{"role": "assistant", "content": text}], tokenize=False)
            ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
            assert ids["input_ids"][0, -1] == tokenizer.eos_token_id
            assert model(**ids).logits[0, 0].item() == pytest.approx(next(ours), abs=1e-5)


def test_eq1_token_values_add_up(rm, other):
    for scorer in (load(rm), implicit(other)):
        gs = pair_groups(scorer.encoder)
        whole = measure(scorer, gs, "--micro-batch-tokens", 300)
        parts = measure(scorer, gs, "--micro-batch-tokens", 300, by_token=True)
        lengths = [len(ids) for g in gs for ids in g.completion_ids]
        assert len(parts) == sum(lengths)
        parts = parts.split(lengths)
        for i, g in enumerate(gs):
            base = 0.0
            if scorer.beta is None:                          # increments: what is left is r(x), the prompt's score
                model = scorer.models[0]
                base = model(torch.tensor([g.prompt_ids])).logits[0, 0].item()
                half = model(torch.tensor([g.prompt_ids + g.completion_ids[0][:1]])).logits[0, 0].item()
                assert parts[2 * i][0].item() == pytest.approx(half - base, abs=1e-4)
            for k in (2 * i, 2 * i + 1):
                assert parts[k].sum().item() == pytest.approx(whole[k].item() - base, abs=1e-4)


def test_implicit_reward_against_plain_transformers(other):
    scorer = implicit(other)
    gs = pair_groups(scorer.encoder, 4)
    ours = iter(measure(scorer, gs).tolist())
    models = [AutoModelForCausalLM.from_pretrained(d) for d in (other, TOY / "model")]
    for g in gs:
        for ids in g.completion_ids:
            full = torch.tensor([g.prompt_ids + ids])
            logps = []
            for model in models:
                every = model(full).logits[0, :-1].log_softmax(-1).gather(1, full[0, 1:, None])
                logps.append(every[len(g.prompt_ids) - 1:].sum())
            assert 0.1 * (logps[0] - logps[1]).item() == pytest.approx(next(ours), abs=1e-4)


def test_truncated_completions_get_no_end_token(rm):
    g = common.Group("x", [{"role": "user", "content": "1+1"}], ["12", "12"], ended=[False, True])
    scorer = load(rm)
    view = read_as(scorer, [g], common.Account("x", "policy", 1), 512, "drop")[id(g)]
    ids = view.completion_ids
    assert ids[0] == ids[1][:-1] and ids[1][-1] in scorer.encoder.stops and view.ended == [False, True]


def test_saved_loaded_in_a_fresh_process_the_same(rm, tmp_path):
    flags = ["--reward-model", str(rm), "--limit", "20", "--output"]
    main(flags + [str(tmp_path / "a.jsonl")])
    script = str(Path(score.__file__))
    subprocess.run([sys.executable, script, *flags, str(tmp_path / "b.jsonl")], check=True, capture_output=True)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


# --- the script ------------------------------------------------------------------------------------------------------------

def test_c12_pairs_accuracy_by_length_and_by_column(rm, tmp_path, capsys):
    data = [dict(r, sort="ab"[i % 2]) for i, r in enumerate(rows(TOY / "pairs.jsonl")[:60])]
    file = write(tmp_path / "p.jsonl", data)
    out = run(capsys, "--reward-model", rm, "--dataset", file, "--by", "sort", "--output", tmp_path / "o.jsonl",
              "--micro-batch-tokens", 100)
    scored = rows(tmp_path / "o.jsonl")
    for r in scored:
        assert r["p_chosen"] == pytest.approx(1 / (1 + math.exp(r["score_rejected"] - r["score_chosen"])))
    p = sum(r["score_chosen"] > r["score_rejected"] for r in scored) / 60
    assert f"accuracy {100 * p:.1f} %" in out and "correlation of score with length" in out and "length alone" in out
    assert "where the better is the longer" in out and "sort = a: accuracy" in out and "of 30 pairs" in out
    assert "█" in out and [r["chosen"] for r in scored] == [r["chosen"] for r in data]


def test_constant_scores_are_half_right(tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model(tmp_path / "rm"))
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(tmp_path / "rm")
    out = run(capsys, "--reward-model", tmp_path / "rm", "--limit", 30)
    assert "accuracy 50.0 %" in out and "30 ties" in out


def test_output_and_pairs_are_trained_on_by_dpo(rm, tmp_path, capsys):
    run(capsys, "--reward-model", rm, "--limit", 40, "--output", tmp_path / "soft.jsonl")
    out = run(capsys, "--reward-model", rm, "--policy", TOY / "model", "--samples", 6, "--limit", 40, "--max-new-tokens", 6,
              "--pairs", tmp_path / "pairs.jsonl", "--select", "best", "--output", tmp_path / "best.jsonl",
              "--ref-model", TOY / "model")
    made = rows(tmp_path / "pairs.jsonl")
    best = rows(tmp_path / "best.jsonl")
    for r in made:
        assert r["score_chosen"] >= r["score_rejected"] and 0.5 <= r["p_chosen"] <= 1 and r["chosen"] != r["rejected"]
    assert "best of n" in out and "equals column 'answer'" in out
    assert "KL(π‖π_ref) 0.000" in out                        # a policy against itself
    highest = {question(r): r["score"] for r in best}
    assert len(best) == 40 and {question(r): r["score_chosen"] for r in made}.items() <= highest.items()
    for n, (file, flags) in enumerate([("soft.jsonl", []), ("pairs.jsonl", []), ("best.jsonl", ["--loss", "sft"])]):
        train_dpo.main(["--dataset", str(tmp_path / file), "--output-dir", str(tmp_path / f"run{n}"),
                        "--max-steps", "1", "--eval-samples", "0", *flags])
        assert "dropped 0" in capsys.readouterr().out


def test_truncated_completions_are_marked_and_never_written_to_be_trained_on(rm, tmp_path, capsys):
    """Training would put an end token behind them."""
    flags = ["--reward-model", rm, "--policy", TOY / "model", "--samples", 6, "--limit", 40, "--max-new-tokens", 3]
    run(capsys, *flags, "--output", tmp_path / "all.jsonl", "--pairs", tmp_path / "pairs.jsonl")
    every = rows(tmp_path / "all.jsonl")
    truncated = {(question(r), r["response"][0]["content"]) for r in every if r["cut"]}
    whole = {(question(r), r["response"][0]["content"]) for r in every if not r["cut"]}
    assert truncated and whole
    for r in rows(tmp_path / "pairs.jsonl"):
        assert {(question(r), r[k][0]["content"]) for k in ("chosen", "rejected")} <= whole
    said = run(capsys, *flags, "--select", "best", "--output", tmp_path / "best.jsonl")
    best = rows(tmp_path / "best.jsonl")
    assert {(question(r), r["response"][0]["content"]) for r in best} <= whole
    assert f"{40 - len(best)} prompts left out" in said

    # Read again, they are still scored without an end, and sft leaves them out.
    run(capsys, "--reward-model", rm, "--dataset", tmp_path / "all.jsonl", "--output", tmp_path / "again.jsonl")
    again = rows(tmp_path / "again.jsonl")
    assert [r["score"] for r in again] == pytest.approx([r["score"] for r in every], abs=1e-4)
    assert [r["cut"] for r in again if r.get("cut")] == [True] * sum(r["cut"] for r in every)
    groups, account = common.read_groups(str(tmp_path / "all.jsonl"), ["response"])
    kept = train_dpo.prepare(groups, account, train_dpo.parse_args(["--loss", "sft"]))
    assert account.dropped == {"that were truncated when sampled": sum(r["cut"] for r in every)}
    assert len(kept) == sum(not r["cut"] for r in every)
    said = refused(capsys, "--reward-model", rm, "--dataset", tmp_path / "all.jsonl", "--confidence", 0.9, "--output", tmp_path / "x.jsonl")
    assert "--confidence" in said and "'response'" in said


def test_p_chosen_agrees_with_the_order_whatever_joins_the_scores(rm, tmp_path, capsys):
    second = reward_model(tmp_path / "second", seed=3)
    flags = ["--reward-model", rm, second, "--policy", TOY / "model", "--samples", 4, "--limit", 40, "--max-new-tokens", 6]
    for more in (["--aggregate", "min"], ["--reward-weights", 1, 9]):
        run(capsys, *flags, *more, "--pairs", tmp_path / "pairs.jsonl")
        made = rows(tmp_path / "pairs.jsonl")
        assert len(made) > 10 and all(r["p_chosen"] >= 0.5 and r["score_chosen"] >= r["score_rejected"] for r in made)


def test_what_a_row_says_of_its_own_completions_is_not_said_of_new_ones(rm, tmp_path, capsys):
    given = rows(TOY / "pairs.jsonl")[:20]
    write(tmp_path / "given.jsonl", [r | {"margin": 1.5} for r in given])
    run(capsys, "--reward-model", rm, "--dataset", tmp_path / "given.jsonl", "--output", tmp_path / "own.jsonl")
    assert all(r["margin"] == 1.5 for r in rows(tmp_path / "own.jsonl"))
    run(capsys, "--reward-model", rm, "--dataset", tmp_path / "given.jsonl", "--policy", TOY / "model", "--samples", 4,
        "--max-new-tokens", 6, "--pairs", tmp_path / "new.jsonl")
    made = rows(tmp_path / "new.jsonl")
    assert made and not any("margin" in r for r in made) and all("answer" in r for r in made)


def test_the_users_own_columns_are_kept(rm, tmp_path, capsys):
    write(tmp_path / "p.jsonl", [dict(r, score_human=3, response_time=0.5) for r in rows(TOY / "pairs.jsonl")[:10]])
    run(capsys, "--reward-model", rm, "--dataset", tmp_path / "p.jsonl", "--output", tmp_path / "o.jsonl")
    assert all(r["score_human"] == 3 and r["response_time"] == 0.5 for r in rows(tmp_path / "o.jsonl"))


def test_keep_chosen_keeps_the_datas_answer_and_has_no_p(rm, tmp_path, capsys):
    run(capsys, "--reward-model", rm, "--dataset", TOY / "pairs.jsonl", "--limit", 30, "--policy", TOY / "model",
        "--max-new-tokens", 6, "--keep-chosen", "--pairs", tmp_path / "k.jsonl")
    truth = {json.dumps(r["prompt"]): r["chosen"] for r in rows(TOY / "pairs.jsonl")[:30]}
    made = rows(tmp_path / "k.jsonl")
    assert made
    for r in made:
        assert r["chosen"] == truth[json.dumps(r["prompt"])] != r["rejected"] and "p_chosen" not in r
    train_dpo.main(["--dataset", str(tmp_path / "k.jsonl"), "--output-dir", str(tmp_path / "run"), "--max-steps", "1",
                    "--eval-samples", "0"])


def test_select_rso_keeps_a_subset(rm, tmp_path, capsys):
    flags = ["--reward-model", rm, "--policy", TOY / "model", "--samples", 8, "--limit", 20, "--max-new-tokens", 6,
             "--select", "rso", "--output", tmp_path / "r.jsonl"]
    said = run(capsys, *flags, "--beta", 0.01)
    few = len(rows(tmp_path / "r.jsonl"))
    run(capsys, *flags, "--beta", 100)
    many = len(rows(tmp_path / "r.jsonl"))
    assert "samples accepted" in said and few < many and many >= 150


def test_compare_response_files(rm, tmp_path, capsys):
    pairs = rows(TOY / "pairs.jsonl")[:50]
    a = write(tmp_path / "a.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in pairs])
    b = write(tmp_path / "b.jsonl", [{"prompt": r["prompt"], "response": r["rejected"]} for r in pairs[::-1]])
    out = run(capsys, "--reward-model", rm, "--dataset", a, a, "--output", tmp_path / "o.jsonl")
    assert "wins 50.0 [50.0, 50.0] % of 50, ties 100.0 % against (1)" in out
    assert len(rows(tmp_path / "o.jsonl")) == 100
    plot = ["--plot", tmp_path / "p.png"] if has_matplotlib() else []
    out = run(capsys, "--reward-model", rm, "--dataset", a, b, "--calibrate-length", "--tokens", tmp_path / "t.html", *plot)
    assert "50 rows of each" in out and "of like length" in out and "</html>" in (tmp_path / "t.html").read_text()
    assert not plot or (tmp_path / "p.png").stat().st_size > 5000


def test_repeated_prompts_and_rows_without_a_partner_are_said(rm, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [{"prompt": p, "response": "1"} for p in "abac"])
    b = write(tmp_path / "b.jsonl", [{"prompt": p, "response": "2"} for p in "xaba"])
    out = run(capsys, "--reward-model", rm, "--dataset", a, b, "--chat")
    assert "3 rows of each are compared, of 2 prompts" in out and "its k-th row meets the k-th" in out
    assert f"without a partner are left out: {{'{a}': 1, '{b}': 1}}" in out


def has_matplotlib():
    return score.importlib.util.find_spec("matplotlib") is not None


def test_calibrated_scores_do_not_follow_length(rm, tmp_path, capsys):
    data = [{"prompt": f"{i}+1", "response": "1 " * (i % 20 + 1)} for i in range(100)]
    file = write(tmp_path / "l.jsonl", data)
    out = run(capsys, "--reward-model", rm, "--dataset", file, "--calibrate-length", "--chat")
    before = abs(float(re.search(r"before --calibrate-length.*length (-?[\d.]+)", out)[1]))
    after = abs(float(re.search(r"correlation of score with length (-?[\d.]+)", out)[1]))
    assert after < 0.1 < before


@pytest.mark.parametrize("stored", [False, True])
def test_eq2_calibration_subtracts_the_mean_of_the_bin_or_the_stored_curve(stored, tmp_path, capsys):
    """Two lengths, so two bins. The curve that is stored with a model says something else, and wins."""
    config = {"reward_mean": 5.0, "reward_std": 1.0, "reward_by_length": [[2.0, 1.0], [4.0, 3.0]]} if stored else {}
    model = reward_model(tmp_path / "rm", **config)
    data = [{"prompt": f"{i}+1", "response": "1" if i % 2 else "123"} for i in range(40)]
    flags = ["--reward-model", model, "--dataset", write(tmp_path / "d.jsonl", data), "--chat", "--output"]
    run(capsys, *flags, tmp_path / "plain.jsonl")
    said = run(capsys, *flags, tmp_path / "calibrated.jsonl", "--calibrate-length")
    plain = [r["score"] for r in rows(tmp_path / "plain.jsonl")]
    long = statistics.mean(plain[::2])
    short = statistics.mean(plain[1::2])
    middle = statistics.mean(plain)
    if stored:
        short, long, middle = 1.0, 3.0, 5.0
    want = [value - (short if i % 2 else long) + middle for i, value in enumerate(plain)]
    assert [r["score"] for r in rows(tmp_path / "calibrated.jsonl")] == pytest.approx(want, abs=1e-6)
    assert ("its config gives reward_mean, reward_std, reward_by_length" in said) == stored


def test_several_models_are_z_scored_with_what_they_stored(rm, tmp_path, capsys):
    """The same scores in another unit, with another offset: min, mean and either alone agree on the order."""
    model = AutoModelForSequenceClassification.from_pretrained(rm)
    for folder, factor in (("one", 1.0), ("two", 10.0)):
        copy = AutoModelForSequenceClassification.from_pretrained(rm)
        copy.score.weight.data = model.score.weight.data * factor
        copy.config.reward_mean = 2.0 * factor
        copy.config.reward_std = 0.5 * factor
        copy.save_pretrained(tmp_path / folder)
        AutoTokenizer.from_pretrained(rm).save_pretrained(tmp_path / folder)
    out = run(capsys, "--reward-model", tmp_path / "one", tmp_path / "two", "--aggregate", "min", "--limit", 20,
              "--output", tmp_path / "o.jsonl")
    run(capsys, "--reward-model", rm, "--limit", 20, "--output", tmp_path / "alone.jsonl")
    assert "they differ by 0.000" in out and "disagree about 0.0 %" in out
    for r, alone in zip(rows(tmp_path / "o.jsonl"), rows(tmp_path / "alone.jsonl")):
        assert r["score_chosen"] == pytest.approx((alone["score_chosen"] - 2.0) / 0.5, abs=1e-3)
        assert max(r["spread"]) < 1e-3


def test_policies_are_compared_with_kl_and_beams_raise_the_reward(rm, other, capsys):
    shared = ["--reward-model", rm, "--limit", 25, "--max-new-tokens", 6]
    out = run(capsys, *shared, "--policy", TOY / "model", other, "--ref-model", TOY / "model", "--samples", 2)
    kls = [float(x) for x in re.findall(r"KL\(π‖π_ref\) (-?[\d.]+)", out)]
    # two samples of a prompt may well be the same: none is dropped for it
    assert kls[0] == 0 and kls[1] > 0.01 and "25 rows of each" in out

    def mean_score(*flags):
        said = run(capsys, *shared, "--policy", TOY / "model", *flags)
        return float(re.search(r"model: score (-?[\d.]+)", said)[1])

    assert mean_score("--num-beams", 4, "--beam-chunk", 1) > mean_score() + 0.1


def test_scores_other_formats(rm, tmp_path, capsys):
    ranked = []
    for i in range(10):
        ranked.append({"prompt": f"{i}+1", "completions": [str(i), str(i + 1), str(i + 2)], "ranks": [3, 1, 2]})
    write(tmp_path / "k.jsonl", ranked)
    out = run(capsys, "--reward-model", rm, "--dataset", tmp_path / "k.jsonl", "--chat", "--output", tmp_path / "k2.jsonl",
              "--pairs", tmp_path / "kp.jsonl")
    assert "of 30 pairs" in out
    assert all(r["ranks_before"] == [3, 1, 2] and len(r["scores"]) == 3 for r in rows(tmp_path / "k2.jsonl"))
    assert len(common.read_groups(tmp_path / "k2.jsonl", ("ranked list",))[0]) == 10 == len(rows(tmp_path / "kp.jsonl"))

    unpaired = [{"prompt": f"{i}+1", "completion": str(i), "label": i % 2} for i in range(10)]
    write(tmp_path / "u.jsonl", unpaired)
    out = run(capsys, "--reward-model", rm, "--dataset", tmp_path / "u.jsonl", "--chat", "--output", tmp_path / "u2.jsonl")
    assert "label = True" in out
    assert [(r["completion"], r["label"]) for r in rows(tmp_path / "u2.jsonl")] == [(str(i), i % 2 == 1) for i in range(10)]


def test_curves_of_run_directories(tmp_path, capsys):
    for name, last in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "metrics.jsonl", [{"step": 1, "loss": 0.7}, {"step": 2, "loss": last}])
    plot = ["--plot", tmp_path / "c.png"] if has_matplotlib() else []
    assert "0.7 → 0.5   0.7 → 0.6" in run(capsys, "--dataset", tmp_path / "a", tmp_path / "b", *plot)
    assert not plot or (tmp_path / "c.png").stat().st_size > 5000


def test_zero_flags_use_runs_rm_or_say_what_makes_it(rm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train_rm.py" in refused(capsys) and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/rm").symlink_to(rm)
    assert "of 2,000 pairs" in run(capsys)


def test_refused_models_and_missing_matplotlib(rm, tmp_path, capsys, monkeypatch):
    assert "train_rm.py" in refused(capsys, "--reward-model", TOY / "model")
    two = AutoModelForSequenceClassification.from_pretrained(TOY / "model", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(TOY / "model").save_pretrained(tmp_path / "two")
    assert "2 outputs" in refused(capsys, "--reward-model", tmp_path / "two")
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    tokenizer.add_tokens(["one more"])
    AutoModelForSequenceClassification.from_pretrained(rm).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    assert "do not belong together" in refused(capsys, "--reward-model", tmp_path / "odd")
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, "--plot", tmp_path / "x.png")


@pytest.mark.parametrize("flags, words", [
    (["--implicit", "x"], ["--ref-model"]),
    (["--ref-model", "x"], ["--implicit"]),
    (["--aggregate", "min"], ["--reward-model"]),
    (["--samples", "4"], ["--policy"]),
    (["--beta", "0"], ["--beta"]),
    (["--limit", "-1"], ["--limit"]),
    (["--sample", "4"], ["--sample"]),                       # no abbreviations
    (["--policy", "a", "b", "--samples", "2", "--pairs", "x.jsonl"], ["--pairs"]),
    (["--policy", "a", "--pairs", "x.jsonl"], ["--samples"]),
    (["--policy", "a", "--samples", "2", "--select", "best"], ["--output"]),
    (["--policy", "a", "--samples", "2", "--temperature", "0"], ["--temperature"]),
    (["--output", "no/such/folder/x.jsonl"], ["no/such/folder"]),
    (["--dataset", "nothing.jsonl"], ["nothing.jsonl"]),
    (["--output", "x.jsonl", "--pairs", "x.jsonl"], ["--output", "different"]),
    (["--plot", "x.xyz"], ["--plot", ".png"]),
    (["--dataset", str(TOY / "pairs.jsonl"), "--output", str(TOY / "pairs.jsonl")], ["pairs.jsonl"]),
    (["--dataset", str(TOY)], ["metrics.jsonl"]),
    (["--implicit", "no/such/model", "--ref-model", "no/such/model"], ["no/such/model"]),
    (["--policy", "no/such/model"], ["no/such/model"]),
    (["--max-length", "4"], ["no rows"]),
    (["--by", "colour"], ["colour", "pairs.jsonl"]),
    (["--dataset", str(TOY / "pairs.jsonl"), str(TOY / "pairs.jsonl")], ["pairs.jsonl", "response"]),
])
def test_bad_input_ends_in_one_sentence(flags, words, rm, capsys):
    own = [] if {"--implicit", "--aggregate", "--limit"} & set(flags) else ["--reward-model", str(rm)]
    said = refused(capsys, *own, *flags)
    assert all(w in said for w in words), said

"""Make everything in tests/toy again from nothing: tokeniser, policy, pairs, prompts.

    python tests/toy/make_toy.py [--out DIR]      # about 5 minutes on two CPU cores

The task: sums of two numbers from 0 to 99, asked in a chat ("47+8" → "55"). The policy is
pretrained with `train_dpo.py --loss sft`: first on right demonstrations, then on imperfect ones, of
which 60 % hold a slip (a digit off by one or two, a forgotten carry, a forgotten last digit), mixed
with marked homework: a dialogue, right or wrong, and behind its end a teacher's mark, y or n. So it
can add and knows a right sum when it sees one, and yet it gives a wrong sum more often than not
when it is sampled: that is what alignment can mend. The sums of the demonstrations, of the pairs
and of the prompts are different ones: nothing that is evaluated was ever seen.
"""
import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_dpo  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<bot>{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}<user>{{ m['content'] }}"
    "{% else %}{{ raise_exception('only user and assistant can speak, not ' + m['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}")

# For pretraining only: the last of four messages is the mark, which stands directly behind the
# answer's end. The third is empty: a prompt that ends in an answer would be continued.
MARKED = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if loop.index0 == 3 %}{{ m['content'] }}{{ eos_token }}"
    "{% elif loop.index0 < 2 %}"
).replace("{% endfor %}", "{% endif %}{% endfor %}"
).replace(
    "{% if add_generation_prompt %}",
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}")


def make_tokeniser():
    """One token a character, and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>"]
    letters = ["\n"] + [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", chat_template=TEMPLATE)


def slip(a, b, rng):
    """A wrong sum as somebody in a hurry writes it."""
    right = str(a + b)
    while True:
        kind = rng.random()
        if kind < 0.6:                                       # one digit off by one or two
            i = rng.randrange(len(right))
            digit = (int(right[i]) + rng.choice([-2, -1, 1, 2])) % 10
            wrong = right[:i] + str(digit) + right[i + 1:]
        elif kind < 0.85:                                    # off by ten: a carry forgotten or made up
            wrong = str(a + b + rng.choice([-10, 10]))
        else:                                                # the last digit forgotten
            wrong = right[:-1]
        is_number = wrong and not wrong.startswith("-") and (wrong == "0" or wrong[0] != "0")
        if is_number and wrong != right:
            return wrong


def ask(x, y):
    return [{"role": "user", "content": f"{x}+{y}"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def homework(sums, answers, marks, rng):
    """For every sum: answers of which 60 % are wrong, and marked ones of which half are."""
    def hurried(x, y, wrong):
        return slip(x, y, rng) if rng.random() < wrong else str(x + y)

    rows = []
    for x, y in sums * answers:
        rows.append({"prompt": ask(x, y), "response": say(hurried(x, y, 0.6))})
    for x, y in sums * marks:
        answer = hurried(x, y, 0.5)
        mark = "y" if answer == str(x + y) else "n"
        empty = [{"role": "system", "content": ""}]
        rows.append({"prompt": ask(x, y) + say(answer) + empty, "response": say(mark)})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_model(sums, asked, folder):
    """Pretrains the policy in three stages → its directory. folder: to work in."""
    torch.manual_seed(0)
    tokenizer = make_tokeniser()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    print(f"{sum(p.numel() for p in model.parameters()) * 4 / 1e6:.2f} MB")
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")

    for name, some in (("right", sums), ("asked", asked)):
        rows = []
        for x, y in some:
            text = str(x + y)
            rows.append({"prompt": ask(x, y), "response": say(text), "answer": text})
        write(folder / f"{name}.jsonl", rows)
    for name, answers, marks in (("slips.jsonl", 4, 4), ("more.jsonl", 2, 8)):
        write(folder / name, homework(sums, answers, marks, random.Random(name)))
    (folder / "marked.jinja").write_text(MARKED)

    def sft(start, data, end, flags):
        train_dpo.main([
            "--loss", "sft", "--model", f"{folder}/{start}", "--dataset", f"{folder}/{data}",
            "--output-dir", f"{folder}/{end}", "--eval-dataset", f"{folder}/asked.jsonl",
            "--eval-every", "500", *flags.split()])

    marked = f"--batch-size 256 --epochs 6 --chat-template {folder}/marked.jinja"
    sft("random", "right.jsonl", "adder", "--batch-size 128 --epochs 36 --learning-rate 3e-3")
    sft("adder", "slips.jsonl", "pupil", f"{marked} --learning-rate 2e-3")
    sft("pupil", "more.jsonl", "model", f"{marked} --learning-rate 1.5e-3")
    tokenizer.save_pretrained(folder / "model")  # with the template for use, not that of the marks
    return folder / "model"


MODEL = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja")


def main(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--out", default=str(Path(__file__).parent))
    out = Path(p.parse_args(argv).out)

    rng = random.Random(0)
    sums = [(x, y) for x in range(100) for y in range(100)]
    rng.shuffle(sums)
    shown = sums[:6500]
    asked = sums[6500:8000]
    pairs = []
    for x, y in sums[8000:]:
        pairs.append({
            "prompt": ask(x, y), "chosen": say(str(x + y)), "rejected": say(slip(x, y, rng)),
            "answer": str(x + y)})
    write(out / "pairs.jsonl", pairs)
    write(out / "prompts.jsonl", [{"prompt": ask(x, y), "answer": str(x + y)} for x, y in asked])

    with tempfile.TemporaryDirectory() as scratch:
        made = make_model(shown, asked, Path(scratch))
        shutil.rmtree(out / "model", ignore_errors=True)
        (out / "model").mkdir()
        for name in MODEL:
            if (made / name).exists():
                shutil.copy(made / name, out / "model" / name)


if __name__ == "__main__":
    main()

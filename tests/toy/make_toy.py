"""Make everything in tests/toy again from nothing: tokeniser, policy, pairs, prompts. About 10 minutes on two CPU cores.

    python tests/toy/make_toy.py [--out DIR]

The task: sums of two numbers from 0 to 99, asked in a chat ("47+8" → "55"). The policy is pretrained with
`train_dpo.py --loss sft` on demonstrations: first on right ones, then on imperfect ones, of which 60 % hold a slip (a digit
off by one, a forgotten carry, a forgotten last digit). So it knows how to add and yet gives a wrong sum more often than
not when it is sampled: that is what alignment can mend. The sums of the demonstrations, of the pairs and of the prompts
are different ones: nothing that is evaluated was ever seen.
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

TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<bot>{{ m['content'] }}{{ eos_token }}\
{% elif m['role'] == 'user' %}<user>{{ m['content'] }}{% else %}{{ raise_exception('only user and assistant can speak, not ' + m['role']) }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<bot>{% endif %}"""


def make_tokeniser():
    """One token a character, and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>"]
    letters = ["\n"] + [chr(c) for c in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + letters)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>", chat_template=TEMPLATE)


def slip(a, b, rng):
    """A wrong sum as somebody in a hurry writes it."""
    right = str(a + b)
    while True:
        kind = rng.random()
        if kind < 0.6:                                       # one digit off by one or two
            i = rng.randrange(len(right))
            wrong = right[:i] + str((int(right[i]) + rng.choice([-2, -1, 1, 2])) % 10) + right[i + 1:]
        elif kind < 0.85:                                    # off by ten: a carry forgotten or made up
            wrong = str(a + b + rng.choice([-10, 10]))
        else:                                                # the last digit forgotten
            wrong = right[:-1]
        if wrong and wrong != right and not wrong.startswith("-") and (wrong == "0" or wrong[0] != "0"):
            return wrong


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def main(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--out", default=str(Path(__file__).parent))
    p.add_argument("--right-epochs", type=int, default=36)
    p.add_argument("--slip-epochs", type=int, default=12)
    a = p.parse_args(argv)
    out, rng = Path(a.out), random.Random(0)
    sums = [(x, y) for x in range(100) for y in range(100)]
    rng.shuffle(sums)
    shown, asked, paired = sums[:6500], sums[6500:8000], sums[8000:]
    ask = lambda x, y: [{"role": "user", "content": f"{x}+{y}"}]  # noqa: E731
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    write(out / "pairs.jsonl", [{"prompt": ask(x, y), "chosen": say(str(x + y)), "rejected": say(slip(x, y, rng)), "answer": str(x + y)} for x, y in paired])
    write(out / "prompts.jsonl", [{"prompt": ask(x, y), "answer": str(x + y)} for x, y in asked])

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        torch.manual_seed(0)
        tokenizer = make_tokeniser()
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0))
        print(f"{sum(q.numel() for q in model.parameters()) * 4 / 1e6:.2f} MB")
        model.save_pretrained(scratch / "random")
        tokenizer.save_pretrained(scratch / "random")
        write(scratch / "right.jsonl", [{"prompt": ask(x, y), "response": say(str(x + y)), "answer": str(x + y)} for x, y in shown])
        write(scratch / "asked.jsonl", [{"prompt": ask(x, y), "response": say(str(x + y)), "answer": str(x + y)} for x, y in asked])
        write(scratch / "slips.jsonl", [{"prompt": ask(x, y), "response": say(slip(x, y, rng) if rng.random() < 0.6 else str(x + y))}
                                        for x, y in shown for _ in range(4)])
        sft = lambda start, data, end, *more: train_dpo.main([  # noqa: E731
            "--loss", "sft", "--model", str(scratch / start), "--dataset", str(scratch / data), "--output-dir", str(scratch / end),
            "--eval-dataset", str(scratch / "asked.jsonl"), "--batch-size", "128", *more])
        sft("random", "right.jsonl", "adder", "--learning-rate", "3e-3", "--epochs", str(a.right_epochs), "--eval-every", "500")
        sft("adder", "slips.jsonl", "model", "--learning-rate", "5e-4", "--epochs", str(a.slip_epochs), "--eval-every", "500")
        shutil.rmtree(out / "model", ignore_errors=True)
        (out / "model").mkdir()
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (scratch / "model" / name).exists():
                shutil.copy(scratch / "model" / name, out / "model" / name)


if __name__ == "__main__":
    main()

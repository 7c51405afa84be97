"""Rewards for the toy, in the signature that trl uses too: one number per completion, columns of the rows as keywords."""


def text(completion):
    """A completion is text, or in a chat a list with one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def right(completions, answer, **_):
    """1 for the right sum, else 0."""
    return [float(text(c).strip() == str(a)) for c, a in zip(completions, answer)]


def close(completions, answer, **_):
    """1 for the right sum, less the further away; 0 for what is no number. Easier to climb, and easier to game."""
    return [1 / (1 + abs(int(text(c)) - int(a))) if text(c).isdigit() else 0.0 for c, a in zip(completions, answer)]
